"""Start a run: check everything first, then create its directory, then start its supervisor. A failed start leaves
nothing behind."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.config import Config, ConfigError, Resolved, expand_files, load, refuse_unsupported
from runtime.config.vocab import count_tokens
from runtime.wire.messages import RunStatus
from runtime.wire.rundir import RunFile, boot_id, write_json
from zerotop.launch.branching import Branch, share_checkpoint, share_trunk
from zerotop.launch.devices import Device, choose
from zerotop.launch.differences import differences, value_text
from zerotop.launch.handshake import start_supervisor
from zerotop.launch.memory_check import memory_warnings
from zerotop.launch.outputs import check_outputs
from zerotop.launch.preparation import prepare
from zerotop.launch.wrapped import (
    checked_command,
    has_gpus,
    refuse_trainer_keys,
    refuse_wrapped,
    without_restarts,
)
from zerotop.output import say
from zerotop.rundir.checkpoints import checkpoints_folder
from zerotop.rundir.directory import (
    RunEntry,
    checkpoint_steps,
    existing_message,
    find_run,
    list_runs,
    make_run_folder,
    read_entry,
)
from zerotop.rundir.executable import record_executable
from zerotop.rundir.lock import take_new, take_patiently
from zerotop.rundir.names import check_name, generate_name
from zerotop.rundir.paths import (
    RunError,
    check_utf8,
    error_text,
    make_private_folder,
    make_sockets_folder,
    remove_sockets,
    runs_home,
    working_folder,
)

_FIXED: dict[str, tuple[str, Callable[[Resolved], Any]]] = {
    "model": ("zerotop.model", lambda resolved: resolved.zerotop.model),
    "data": ("zerotop.data", lambda resolved: resolved.zerotop.data),
    "seed": ("zerotop.train.seed", lambda resolved: resolved.zerotop.train.seed),
    "optimizer type": ("optimizer.type", lambda resolved: resolved.optimizer and resolved.optimizer.type),
    "global batch": ("train_batch_size", lambda resolved: resolved.global_batch),
}
"""What a resume must not change: name -> (config key, its value in a resolved config)."""


_Asked = tuple[
    str | Path | None, int | None, str, str | None, Sequence[str], bool, Sequence[str] | None, Branch | None
]  # see _check


@dataclass(frozen=True)
class _Plan:
    """A run that has passed every check that can be made before anything exists."""

    config: Config
    resolved: Resolved
    config_path: str
    config_folder: str
    device: Device
    nproc: int
    script: list[str] | None
    notes: list[dict[str, str]]
    previous: RunEntry | None
    branch: Branch | None = None
    wrapped: list[str] | None = None
    as_deepspeed: bool = False


def start_run(
    config_path: str | Path | None,
    *,
    nproc: int | None = None,
    device: str = "auto",
    name: str | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    script: Sequence[str] | None = None,
    command: Sequence[str] | None = None,
    as_deepspeed: bool = False,
    branch: Branch | None = None,
) -> RunEntry:
    """Start a run, or with `resume` the next attempt of the run called `name`, and return when its supervisor is up.

    `config_path` may be None with `resume`: the run's own config is used. With `branch` a new run starts from that
    checkpoint, with the config, the script, the ranks and the device of its run unless others are given. `script` is
    SCRIPT.py and its arguments. `command` is started in place of torchrun. as_deepspeed: `import
    deepspeed` in the script gives our engine. Raises RunError or ConfigError with a message for the user; then nothing
    was started and nothing is left behind.
    """
    names = {
        "the config": str(config_path or ""),
        "the state home": str(runs_home()),
        "the working directory": working_folder(),
        **{f"argument {number} of the script" if number else "the script": w for number, w in enumerate(script or ())},
    }
    for what, text in names.items():
        check_utf8(what, text)
    try:
        return _start((config_path, nproc, device, name, overrides, resume, script, branch), command, as_deepspeed)
    except OSError as error:  # a full disk, a folder that may not be read: anywhere on the way
        raise RunError(f"the run can't start: {error_text(error)}") from None


def start_wrapped(
    wrapped: Sequence[str],
    *,
    nproc: int | None = None,
    name: str | None = None,
    config_path: str | Path | None = None,
    overrides: Sequence[str] = (),
    as_deepspeed: bool = False,
) -> RunEntry:
    """Start a run of the user's own command, with its arguments, and return when its supervisor is up.

    nproc: start it as so many ranks under torchrun: `wrapped` is then SCRIPT.py and its arguments, with or without
    `python` in front. as_deepspeed: `import deepspeed` gives our engine. The config may have a "zerotop" section for
    restarts and alerts. Raises RunError or ConfigError with a message for the user; then nothing was started and
    nothing is left behind.
    """
    for number, word in enumerate(wrapped):
        check_utf8(f"word {number + 1} of the command", word)
    try:
        if name is not None:
            check_name(name)
            if (runs_home() / name).exists():
                raise RunError(existing_message(name))
        config = load(config_path if config_path is not None else {}, overrides)
        refuse_trainer_keys(config.raw, config.origin)
        resolved = without_restarts(config.resolve(1, "cpu", script=True))
        words = checked_command(wrapped, nproc)
        origin = os.path.abspath(config_path) if config_path is not None else ""
        folder = os.path.dirname(origin) if origin else working_folder()
        device: Device = "cuda" if has_gpus() else "cpu"
        found = check_outputs(config, resolved.zerotop, on_gpu=device == "cuda")
        notes = [{"what": "note", "text": text} for text in found]
        with contextlib.ExitStack() as leaving:
            plan = _Plan(
                config,
                resolved,
                origin,
                folder,
                device,
                nproc=nproc or 0,
                script=None,
                notes=notes,
                previous=None,
                wrapped=words,
                as_deepspeed=as_deepspeed,
            )
            return _begin(plan, name, None, leaving)
    except OSError as error:
        raise RunError(f"the run can't start: {error_text(error)}") from None


def _start(asked: _Asked, command: Sequence[str] | None, as_deepspeed: bool) -> RunEntry:
    """As `start_run`, which has the arguments of `_check`."""
    name = asked[3]
    plan = _check(*asked)
    if as_deepspeed and not plan.script:
        raise RunError("--as-deepspeed is for a script of your own: zerotop launch CONFIG --as-deepspeed -- SCRIPT.py")
    with contextlib.ExitStack() as leaving:
        if plan.previous is not None:
            # Two launches may run at once, and ranks whose supervisor was killed may still be saving.
            path = plan.previous.path
            lock = take_patiently(path, check=lambda: _previous(name), tell=say)
            leaving.callback(os.close, lock)  # the supervisor has it too, by then
            plan = _check(*asked, prepared=True)  # as it is now
            if plan.previous is not None:
                as_deepspeed = as_deepspeed or plan.previous.run.as_deepspeed
            return _begin(replace(plan, as_deepspeed=as_deepspeed), name, command, leaving, lock)
        return _begin(replace(plan, as_deepspeed=as_deepspeed), name, command, leaving)


def _begin(
    plan: _Plan,
    name: str | None,
    command: Sequence[str] | None,
    leaving: contextlib.ExitStack,
    lock: int | None = None,
) -> RunEntry:
    """Write the run's files and start its supervisor. lock: of the run that is resumed."""
    record_executable()  # attach over SSH finds zerotop by it
    undo = leaving.enter_context(contextlib.ExitStack())
    if plan.previous is not None and lock is not None:
        path, attempt = plan.previous.path, plan.previous.run.attempt + 1
    else:
        path, attempt = make_run_folder(name or generate_name({entry.name for entry in list_runs()})), 1
        undo.callback(shutil.rmtree, path, ignore_errors=True)
        lock = take_new(path)
        leaving.callback(os.close, lock)
    run = _write_files(plan, path, attempt, command, undo)
    if plan.branch is not None:
        share_checkpoint(plan.branch, checkpoints_folder(path, run, plan.resolved.zerotop.checkpoint.folder))
        share_trunk(plan.branch, path)
    start_supervisor(path, run, resume=plan.previous is not None or plan.branch is not None, lock=lock)
    undo.pop_all()
    return read_entry(path)


def read_notes(entry: RunEntry) -> list[dict[str, str]]:
    """What launch found in the config of the newest attempt, each as {"what": note | changed, "text": ...}."""
    try:
        notes: list[dict[str, str]] = json.loads((entry.logs() / "notes.json").read_text())["notes"]
    except (OSError, ValueError, KeyError):
        return []
    return notes


# ---- checks ----------------------------------------------------------------------------------------------------------
def _check(
    config_path: str | Path | None,
    nproc: int | None,
    device: str,
    name: str | None,
    overrides: Sequence[str],
    resume: bool,
    script: Sequence[str] | None,
    branch: Branch | None = None,
    prepared: bool = False,
) -> _Plan:
    """prepared: model and data have been prepared by an earlier call."""
    if name is not None:
        check_name(name)
    previous = _previous(name) if resume else None
    if previous is None and name is not None and (runs_home() / name).exists():
        raise RunError(existing_message(name))
    base = previous if branch is None else branch.parent
    if base is not None:
        refuse_wrapped(base, "--resume" if branch is None else "branch")
    if config_path is None and base is None:
        raise RunError("launch needs a config file: zerotop launch CONFIG")
    if base is not None and script is None:
        script = base.run.script
    chosen, count = choose(
        device if device != "auto" or base is None else base.run.device,
        nproc if nproc is not None or base is None else base.run.nproc,
    )
    if config_path is None:
        assert base is not None
        config = load(base.path / "config.json", overrides)
        origin, folder = base.run.config_path, base.run.config_folder
    else:
        config = load(config_path, overrides)
        origin = os.path.abspath(config_path)
        folder = os.path.dirname(origin)
    fewer: list[str] = []
    if nproc is None and base is None and chosen == "cpu":
        count = _ranks_on_cpu(config, count, bool(script), fewer)
    resolved = config.resolve(count, chosen, script=bool(script))
    try:
        refuse_unsupported(resolved)
    except ConfigError as error:
        raise ConfigError(error.problems, config.origin) from None
    outputs = check_outputs(config, resolved.zerotop, on_gpu=chosen == "cuda")
    notes = [{"what": "note", "text": text} for text in (*fewer, *resolved.notes, *outputs)]
    if previous is not None and not checkpoint_steps(previous.path) and resolved.zerotop.checkpoint.folder is None:
        notes.append({"what": "changed", "text": "there is no complete checkpoint: the run starts again from step 0"})
    if script:
        script = _checked_script(script)
    elif resolved.zerotop.model.path is None:
        _check_data(config, resolved, Path(folder))
    elif not prepared:
        say("preparing model and data")
        prepare(resolved, Path(folder), config.origin)
    if not script:
        warnings = memory_warnings(resolved, Path(folder))
        notes += [{"what": "memory", "text": text, "severity": "warning"} for text in warnings]
    if branch is not None:
        text = f"branch of {branch.parent.name} at step {branch.step}"
        notes.append({"what": "branch", "text": text})
    if base is not None:
        notes += _compare(base, resolved, "--resume can't continue" if branch is None else "branch can't continue")
    words = list(script) if script else None
    return _Plan(config, resolved, origin, folder, chosen, count, words, notes, previous, branch)


def _check_data(config: Config, resolved: Resolved, folder: Path) -> None:
    """Check what the ranks would otherwise find only after their start."""
    data = resolved.zerotop.data
    try:
        files = expand_files(data.files, folder) if data.files else []
        count_tokens(data.tokenizer, folder)
        tokens = sum(
            path.stat().st_size + 1 for path in files
        )  # a byte or less is a token, and each file ends with one
        if files and tokens <= data.seq_len:
            raise ConfigError(
                f"zerotop.data.seq_len: {data.seq_len} tokens are more than the text of zerotop.data.files has "
                f"({tokens:,} at most): lower it, or name more text"
            )
    except ConfigError as error:
        raise ConfigError(error.problems, config.origin) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'zerotop.data.tokenizer: expected "bytes", a tokenizer.json, or a folder with one, got {data.tokenizer!r} '
            f"({getattr(error, 'strerror', None) or error})",
            config.origin,
        ) from None


def _ranks_on_cpu(config: Config, count: int, script: bool, notes: list[str]) -> int:
    """Number of ranks on a CPU without --nproc: `count`, or one where the config's batch sizes fit only that."""
    for ranks in (count, 1):
        try:
            config.resolve(ranks, "cpu", script=script)
        except ConfigError:
            continue
        if ranks < count:
            notes.append(f"1 rank: the config's batch sizes don't fit {count} (--nproc chooses)")
        return ranks
    return count  # neither: the message is about the usual number


def _previous(name: str | None) -> RunEntry:
    if name is None:
        ended = [entry.name for entry in list_runs() if not entry.live]
        known = f" Runs that have ended: {', '.join(ended[:8])}" if ended else " No run has ended yet"
        raise RunError(f"--resume needs --name: which run is to go on?{known}")
    entry = find_run(name)
    if entry.live:
        raise RunError(
            f"run {name} is {entry.status.state}: there is nothing to resume. zerotop attach {name} opens it"
        )
    return entry


def _checked_script(script: Sequence[str]) -> list[str]:
    path = Path(script[0])
    if not path.is_file():
        raise RunError(f"{script[0]}: there is no such script. After -- comes SCRIPT.py and its arguments")
    try:
        compile(path.read_bytes(), str(path), "exec")
    except SyntaxError as error:
        line = f"\n    {error.text.strip()}" if error.text else ""
        raise RunError(f"{script[0]}, line {error.lineno}: {error.msg}; nothing was started{line}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{script[0]}: expected a Python script, and it can't be read: {error}") from None
    return [str(path.resolve()), *script[1:]]


def _compare(previous: RunEntry, resolved: Resolved, refusal: str) -> list[dict[str, str]]:
    """What a resume changes, as notes. Raises RunError for what it must not change."""
    try:
        old = Resolved.from_json((previous.path / "resolved.json").read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"can't read {previous.path / 'resolved.json'}: {str(error).splitlines()[0]}") from None
    broken = []
    for words, (key, read) in _FIXED.items():
        before, now = read(old), read(resolved)
        if before != now:
            broken.append(f"{words} ({key}): was {value_text(before)}, is {value_text(now)}")
    if broken:
        listed = "\n  - ".join(broken)
        raise RunError(
            f"{refusal} {previous.name} with another\n  - {listed}\n"
            "restore these, or start a new run under another --name"
        )
    changes = differences(
        old.model_dump(mode="json", exclude={"notes"}), resolved.model_dump(mode="json", exclude={"notes"})
    )
    return [
        {"what": "changed", "text": f"{key}: {value_text(before)} -> {value_text(now)}"} for key, before, now in changes
    ]


# ---- files and the supervisor ----------------------------------------------------------------------------------------
def _write_files(
    plan: _Plan, path: Path, attempt: int, command: Sequence[str] | None, undo: contextlib.ExitStack
) -> RunFile:
    try:
        make_private_folder(path / "logs")
        logs = make_private_folder(path / "logs" / str(attempt))
        sockets = make_sockets_folder()
        undo.callback(remove_sockets, sockets)
        now = time.time()
        base = plan.branch.parent if plan.branch is not None else plan.previous
        run = RunFile(
            name=path.name,
            created_wall_s=plan.previous.run.created_wall_s if plan.previous else now,
            attempt=attempt,
            host=socket.gethostname(),
            boot_id=boot_id(),
            nproc=plan.nproc,
            device=plan.device,
            config_path=plan.config_path,
            config_folder=plan.config_folder,
            working_folder=base.run.working_folder if base else working_folder(),
            script=plan.script,
            command=list(command) if command else None,
            wrapped=plan.wrapped,
            as_deepspeed=plan.as_deepspeed,
            sockets=str(sockets),
            version=_version(),
            branch_of=plan.branch.point if plan.branch else plan.previous.run.branch_of if plan.previous else None,
        )
        wrapped = plan.wrapped is not None
        status = RunStatus(name=run.name, state="starting", wrapped=wrapped, attempt=attempt, started_wall_s=now)
        if plan.branch is not None:
            status = status.model_copy(update={"last_checkpoint_step": plan.branch.step, "step": plan.branch.step})
        if plan.previous is not None:
            old = plan.previous.status
            status = status.model_copy(
                update={"last_checkpoint_step": old.last_checkpoint_step, "step": old.last_checkpoint_step or 0}
            )
            for kept in ("config.json", "resolved.json", "run.json", "state.json"):
                undo.callback(_restore, path / kept, (path / kept).read_bytes())
        write_json(logs / "notes.json", {"notes": plan.notes})
        write_json(path / "config.json", plan.config.raw)
        write_json(path / "resolved.json", plan.resolved)
        write_json(path / "state.json", status)
        write_json(path / "run.json", run)
    except OSError as error:
        raise RunError(f"can't write the run directory {path}: {error.strerror}") from None
    return run


def _restore(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _version() -> str:
    try:
        return importlib.metadata.version("zerotop")
    except importlib.metadata.PackageNotFoundError:
        return ""
