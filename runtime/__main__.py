"""One rank: `python -m runtime CONFIG.json` or `python -m runtime SCRIPT.py ARGS...`, started by torchrun.

Under `zerotop launch` (ZEROTOP_RUN is set) config and script come from the run's run.json, and output goes to the run's
log files. Otherwise they come from the arguments, and output goes to the terminal.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

from runtime.process.forked import Owner
from runtime.process.garbage import importing
from runtime.process.tempdir import keep_socket_paths_short
from runtime.telemetry import allow_tracing, die_with_parent, register_stacks, stopsignal
from runtime.telemetry.flight_recorder import write_flight
from runtime.telemetry.handler import StartHandler
from runtime.wire.rundir import ATTEMPT_VARIABLE, RUN_VARIABLE, SUPERVISOR_VARIABLE
from runtime.wire.startnote import begin_start, tell_start

ERROR_LINES = 40
"""Lines of an error to send in the goodbye."""
TRACEBACK_LINES = 6
"""Lines of the traceback to keep in front of an out-of-memory report, however long that is."""
LAST_CHECKPOINT_S = 5.0
"""Seconds to wait for a running save after a failure."""


def main() -> int:
    """Train as one rank; returns the exit code."""
    run = os.environ.get(RUN_VARIABLE)
    if run:
        # If torchrun is killed, nothing else would end this rank.
        die_with_parent(signal.SIGKILL)
        stopsignal.listen()
        rank = int(os.environ.get("RANK", "0"))
        logs = Path(run) / "logs" / os.environ.get(ATTEMPT_VARIABLE, "1")
        logs.mkdir(parents=True, exist_ok=True)
        _redirect_output(logs, rank)
        register_stacks(logs, rank)
        if (supervisor := os.environ.get(SUPERVISOR_VARIABLE, "")).isdecimal():
            allow_tracing(int(supervisor))
    # Log the Python stacks on SIGSEGV, SIGBUS, SIGABRT, SIGFPE and SIGILL.
    faulthandler.enable(file=sys.stderr, all_threads=True)
    logging.basicConfig(
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s", level=logging.WARNING, stream=sys.stdout
    )
    logging.getLogger("runtime").setLevel(logging.INFO)
    for trainer in ("runtime.train", "runtime.trainer"):  # which log how far model and data are prepared
        logging.getLogger(trainer).addHandler(StartHandler(logging.INFO))
    try:
        _train(Path(run) if run else None, sys.argv[1:])
    except SystemExit as leaving:
        return _exited(leaving.code)
    except BaseException as error:
        return _failed(error)
    return 0


def _train(run: Path | None, arguments: list[str]) -> None:
    from runtime.config import ConfigError, Resolved, load
    from runtime.wire.rundir import read_run

    launched = read_run(run) if run is not None else None
    if launched is not None:
        keep_socket_paths_short(Path(launched.sockets))
        if os.environ.get("RANK", "0") == "0":
            begin_start(Path(launched.sockets))
        tell_start("importing torch")
    if launched is not None and launched.script:
        arguments = launched.script
    if arguments and arguments[0].endswith(".py"):
        _run_script(arguments)
        return
    with importing():
        from runtime.comm import join_world
        from runtime.trainer.train import train

    if run is not None and launched is not None:
        train(Resolved.from_json((run / "resolved.json").read_bytes()), Path(launched.config_folder))
        return
    if len(arguments) != 1:
        raise ConfigError(f"expected one CONFIG.json or a SCRIPT.py with its arguments, got {arguments or 'nothing'}")
    import torch.distributed as dist

    device = join_world()
    config = load(arguments[0])
    train(config.resolve(dist.get_world_size(), "cuda" if device.type == "cuda" else "cpu"), config.folder)


def _run_script(arguments: list[str]) -> None:
    """Run the user's script as `python SCRIPT.py ARGS...` does, with its folder first in sys.path."""
    script = Path(arguments[0]).resolve()
    tell_start(f"running {script.name} up to initialize()")
    sys.argv = [str(script), *arguments[1:]]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    _goodbye("finished", "")


def _redirect_output(logs: Path, rank: int) -> None:
    """Redirect stdout and stderr of this process, C++ code included, to the rank's log file; in append mode, so that
    the supervisor may truncate it."""
    handle = os.open(logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _exited(code: object) -> int:
    """Handle `sys.exit(code)` of a script or a stopped run; returns the exit code."""
    if code is None or code == 0:
        _goodbye("finished", "SystemExit: 0")  # a stopped run has sent its goodbye already, and only the first counts
        return 0
    if not isinstance(code, int):
        print(code, file=sys.stderr)
    _goodbye("failed", f"SystemExit: {code}")
    return code if isinstance(code, int) else 1


def _failed(error: BaseException) -> int:
    """Print `error` and send it to the hub; returns the exit code."""
    from runtime.config import ConfigError
    from runtime.config.presets import ModelError
    from runtime.data import DataError
    from runtime.engine.nonfinite import TrainingError

    if isinstance(error, ConfigError | DataError | ModelError):
        print(f"error: {error}", file=sys.stderr, flush=True)
        _goodbye("failed", str(error), fatal=True)
        return 2
    _save_flight()
    memory = _explained(error)  # first, because it frees what the failed step holds
    traceback.print_exception(error)
    lines = "".join(traceback.format_exception(error)).splitlines()
    if memory is None:
        culprit = error.culprit if isinstance(error, TrainingError) else None
        _goodbye("failed", "\n".join(lines[-ERROR_LINES:]), isinstance(error, TrainingError), culprit)
        return 1
    report, reason = memory
    printed = ["", *report, f"error: {reason}"]  # the last line has the same form as for a refused config
    print(*printed, sep="\n", file=sys.stderr, flush=True)
    lines = [*lines[-max(TRACEBACK_LINES, ERROR_LINES - len(printed)) :], *printed]
    _goodbye("failed", "\n".join(lines), fatal=True)
    return 1


def _save_flight() -> None:
    """Leave the Flight Recorder of a rank that fails in the attempt's folder: which collective it was in, and which
    ones it took part in before."""
    run = os.environ.get(RUN_VARIABLE)
    if run and "torch.distributed" in sys.modules:
        rank = int(os.environ.get("RANK", "0"))
        write_flight(Path(run) / "logs" / os.environ.get(ATTEMPT_VARIABLE, "1"), rank)


def _explained(error: BaseException) -> tuple[tuple[str, ...], str] | None:
    """(lines, one-line reason) of the out-of-memory report on `error`; None for any other error."""
    if "torch" not in sys.modules:
        return None
    try:
        from runtime.diagnose import outofmemory
        from runtime.engine.engine import Engine
        from runtime.engine.session import current_session

        found = outofmemory.explain(error, current_session(), keep=Engine)
    except Exception as problem:  # even the import may run out of memory; the traceback matters more
        print(f"could not build the out-of-memory report: {type(problem).__name__}: {problem}", file=sys.stderr)
        return None
    return (found.lines, found.reason) if found is not None else None


def _goodbye(outcome: str, error: str, fatal: bool = False, culprit: int | None = None) -> None:
    """Send a goodbye to the hub, if this rank has connected to it. fatal: whether another attempt would fail the same
    way. culprit: the rank that caused it, if known."""
    from runtime.engine.session import current_session

    session = current_session()
    if session is not None:
        session.link.goodbye(outcome, session.step(), error, fatal, culprit)  # type: ignore[arg-type]


def _leave(code: int) -> None:
    """Wait for a running save and send pending messages. After a failure the wait is short, as other ranks' writers may
    be gone."""
    from runtime.engine.session import current_session

    if (checkpointer := sys.modules.get("runtime.checkpoint.checkpointer")) is not None:
        checkpointer.leave_all(None if code == 0 else LAST_CHECKPOINT_S)

    session = current_session()
    if session is not None:
        session.link.close()


if __name__ == "__main__":
    rank_process = Owner()
    code = main()
    if rank_process.is_here:  # not in a child that the script has forked
        _leave(code)
    atexit._run_exitfuncs()  # handlers of the script, such as its logger's
    sys.stdout.flush()
    sys.stderr.flush()
    # Skip the interpreter's shutdown, where a process group's threads may abort, or hang when peers are gone.
    # Everything is saved by now.
    os._exit(code)
