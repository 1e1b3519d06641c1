"""The faults. Each strikes, and says what must follow: a restart, an end after which the run is resumed, or nothing."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from runtime.checkpoint.format.folder import complete
from tests.faults.chaos.checks import Checkpoints
from tests.faults.chaos.disk import Disk
from tests.faults.chaos.run import Run, Screen, inside_a_write

Follows = Literal["restart", "end", "nothing"]
KILL, STOP, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM


@dataclass
class Scene:
    """What a fault can reach."""

    run: Run
    checkpoints: Checkpoints
    disk: Disk
    chance: random.Random


@dataclass(frozen=True)
class Struck:
    """What was done, in words, and what must follow. undo: at the end of what the fault lasts."""

    what: str
    kind: str
    """What is alike, whichever rank or file it was and whenever."""
    follows: Follows
    undo: Callable[[], None] | None = None
    silent: bool = False
    """Meanwhile the run can't say how it goes."""
    damages: bool = False
    """The newest checkpoint is not sound any more."""
    saves: bool = False
    """The run's last step must be in a checkpoint."""


def rank(scene: Scene) -> Struck:
    number = scene.chance.choice((KILL, KILL, TERM, STOP))
    victim, process = scene.chance.choice(sorted(scene.run.ranks().items()))
    where = _moment(scene)
    follows: Follows = "end" if number == TERM else "restart"
    return _signal(process, number, f"rank {victim}", where, follows, kind="a rank")


def torchrun(scene: Scene) -> Struck:
    number, process = scene.chance.choice((KILL, KILL, TERM)), scene.run.torchrun()
    return _signal(process, number, "torchrun", _moment(scene), "nothing" if number == TERM else "restart")


def every_process(scene: Scene) -> Struck:
    """A batch system ends the job, or somebody the machine."""
    number = scene.chance.choice((TERM, signal.SIGUSR1))
    where, processes = _moment(scene), scene.run.processes()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            if number == TERM:  # as systemd does when it ends a session
                process.send_signal(signal.SIGHUP)
    return Struck(f"{number.name} of every process {where}", f"{number.name} of every process", "end", saves=True)


def supervisor(scene: Scene) -> Struck:
    number, process = scene.chance.choice((KILL, TERM, STOP)), scene.run.supervisor()
    where = _moment(scene)
    if number == STOP:
        process.send_signal(STOP)
        return Struck(
            f"SIGSTOP of the supervisor {where}, for a while",
            "SIGSTOP of the supervisor",
            "nothing",
            lambda: process.send_signal(signal.SIGCONT),
            silent=True,
        )
    return _signal(process, number, "the supervisor", where, "end")


def writer(scene: Scene) -> Struck:
    number = scene.chance.choice((KILL, KILL, STOP, TERM))
    scene.run.until(lambda: len(scene.run.writers()) == scene.run.nproc, "writer processes")
    where = _moment(scene)
    return _signal(scene.chance.choice(scene.run.writers()), number, "a writer", where, "nothing")


def screen(scene: Scene) -> Struck:
    number, shown = scene.chance.choice((KILL, STOP, TERM)), Screen(scene.run)
    shown.process.send_signal(number)
    what = f"{number.name} of a screen"
    return Struck(what, what, "nothing", shown.close)


def disk_full(scene: Scene) -> Struck:
    """Before a checkpoint begins (it is seen), or while it is being written (it fails)."""
    where = _moment(scene)
    scene.disk.fill()
    return Struck(f"disk full {where}", "disk full", "nothing", scene.disk.empty)


def read_only(scene: Scene) -> Struck:
    where = _moment(scene)
    scene.disk.forbid()
    return Struck(f"read-only {where}", "read-only directory", "nothing", scene.disk.allow)


def damage(scene: Scene) -> Struck:
    """The newest checkpoint is cut short or changed, then a rank is killed: it must not be read."""
    newest = complete(scene.checkpoints.folder)[-1].path
    file = scene.chance.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
    cut = scene.chance.random() < 0.5
    scene.checkpoints.damage(newest)
    if cut:
        os.truncate(file, scene.chance.randrange(file.stat().st_size))
    else:
        _flip(file, scene.chance)
    process = scene.run.ranks()[0]
    process.send_signal(KILL)
    name, how = f"{newest.name}/{file.relative_to(newest)}", "cut short" if cut else "one bit flipped"
    return Struck(f"{name} {how}, and SIGKILL of rank 0", f"checkpoint file {how}", "restart", damages=True)


FAULTS: list[tuple[int, Callable[[Scene], Struck]]] = [
    (6, rank), (2, torchrun), (2, every_process), (4, supervisor), (4, writer), (1, screen),
    (2, disk_full), (1, read_only), (3, damage),
]  # fmt: skip
"""With their weights."""


def each(seed: int) -> list[Callable[[Scene], Struck]]:
    """All of them once, in an order of the seed's."""
    return random.Random(seed).sample([fault for _, fault in FAULTS], len(FAULTS))


def any_of_them(scene: Scene) -> Struck:
    (act,) = scene.chance.choices([fault for _, fault in FAULTS], [weight for weight, _ in FAULTS])
    return act(scene)


def _signal(
    process: psutil.Process, number: signal.Signals, whose: str, where: str, follows: Follows, kind: str = ""
) -> Struck:
    process.send_signal(number)
    saves = follows == "end" and number == TERM
    return Struck(f"{number.name} of {whose} {where}", f"{number.name} of {kind or whose}", follows, saves=saves)


def _moment(scene: Scene) -> str:
    """Wait for one, and say which it is."""
    kind = scene.chance.choice(("training", "write", "rename"))
    if kind != "training" and inside_a_write(scene.run, scene.chance, rename=kind == "rename"):
        return f"inside a checkpoint's {kind}"
    time.sleep(scene.chance.uniform(0, 0.3))
    return "while it trains"


def _flip(file: Path, chance: random.Random) -> None:
    """One bit, anywhere; not white space of JSON, which means nothing."""
    with file.open("r+b") as out:
        size = file.stat().st_size
        while True:
            at = chance.randrange(size)
            out.seek(at)
            (byte,) = out.read(1)
            if not chr(byte).isspace():
                break
        out.seek(at)
        out.write(bytes([byte ^ (1 << chance.randrange(8))]))
