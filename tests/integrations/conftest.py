"""`zerotop run` of the scripts in scripts/, each of which trains with another trainer."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.harness import ROOT
from tests.harness.runs import StartedRun, end_runs
from zerotop.launch.start import start_wrapped

SCRIPTS = ROOT / "tests" / "integrations" / "scripts"
RunScript = Callable[..., StartedRun]


@pytest.fixture
def run_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunScript]:
    """`run_script("ddp.py", nproc=2, STEPS=40)`: a run of the script with this environment. launcher: the command that
    starts its ranks, before the script."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "out").mkdir()
    runs: list[StartedRun] = []

    def begin(
        script: str,
        nproc: int | None = 2,
        as_deepspeed: bool = False,
        launcher: Sequence[str] = (sys.executable,),
        **environment: object,
    ) -> StartedRun:
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        entry = start_wrapped([*launcher, str(SCRIPTS / script)], nproc=nproc, as_deepspeed=as_deepspeed)
        for name in environment:
            monkeypatch.delenv(name)
        runs.append(StartedRun(entry, tmp_path / "no-pids"))
        return runs[-1]

    yield begin
    end_runs(runs)


def losses(run: StartedRun) -> list[str]:
    """The losses that rank 0, or a command without ranks, has printed, with all their bits."""
    texts = [path.read_text() for name in ("rank-0.log", "launcher.log") if (path := run.entry.logs() / name).exists()]
    found = re.findall(r"0x[0-9a-fp.+-]+", next(t for text in texts for t in re.findall("LOSSES (.*)", text)))
    assert found
    return found
