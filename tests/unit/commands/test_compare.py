"""zerotop compare: the report, the document, and the exit code for a CI job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime.wire.messages import RunStatus
from runtime.wire.rundir import BranchPoint, write_json
from tests.harness.fakerun import write_run
from tests.harness.longrun import SpokenRun, write
from zerotop.cli import main


def record(home: Path, name: str, *, seed: int = 0, steps: int = 60, slow: float = 1000.0, lr: float = 1e-3) -> Path:
    path = write_run(home, name, home, RunStatus(name=name, state="finished", attempt=1, step=steps))
    write_json(path / "resolved.json", {"optimizer": {"lr": lr}, "notes": [name]})
    run = SpokenRun(seed=seed, name=name)
    for _ in range(steps):
        run.steps(1, slow)
        run.node()
    return write(path, run)


@pytest.fixture
def runs(home: Path) -> Path:
    record(home, "a")
    record(home, "b", seed=1, lr=1e-4)
    record(home, "slow", seed=2, slow=2000.0)
    return home


def test_the_report(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "a", "b"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("≈ b beside a: within noise (loss, speed)")
    for part in ("LOSS BY STEP", "LOSS BY TIME", "LOSS BY TOKENS", "optimizer.lr  0.001  0.0001", "peak memory"):
        assert part in text
    assert "notes" not in text


def test_the_document_and_the_gate(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "a", "slow", "--json"]) == 0  # no gate: looking is no failure
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"] == "worse" and document["figures"]["speed"]["judgement"] == "worse"
    assert document["figures"]["speed"]["change"] == pytest.approx(-0.5, abs=0.01)
    assert document["a"]["name"] == "a" and document["b"]["step"] == 60 and document["common_steps"] == 60
    assert set(document["loss"]) == {"step", "time", "tokens"}
    assert main(["compare", "a", "slow", "--gate", "speed"]) == 1
    assert main(["compare", "a", "slow", "--gate", "memory,loss"]) == 0
    assert main(["compare", "slow", "a", "--gate", "speed"]) == 0
    assert main(["compare", "a", "slow", "--gate", "speed", "--tolerance", "speed=60%"]) == 0


def test_what_cannot_be_compared_does_not_pass_a_gate(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(runs, "short", steps=5)
    assert main(["compare", "a", "short", "--gate", "loss"]) == 1
    assert "too few to compare" in capsys.readouterr().out


def test_a_branch_says_so(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = record(runs, "c", seed=1)
    status = RunStatus(name="c", state="finished")
    write_run(runs, "c", runs, status, branch_of=BranchPoint(run="a", step=40, path=str(path)))
    assert main(["compare", "a", "c"]) == 0
    text = capsys.readouterr().out
    assert "c is a branch of a at step 40" in text and "over the last 20 common steps (41 to 60)" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "nobody"], "there is no run called 'nobody'"),
        (["a", "a"], "a and a are the same run: expected two"),
        (["a", "b", "--gate", "colour"], "--gate: expected loss, speed, memory"),
        (["a", "b", "--tolerance", "speed"], "--tolerance: expected FIGURE=SHARE, such as speed=5%"),
        (["a", "b", "--tolerance", "speed=-1"], "--tolerance: expected"),
        (["a", "b", "--watch"], "--watch draws a screen and needs a terminal"),
    ],
)
def test_what_is_asked_wrongly_is_one_message(
    runs: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["compare", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_a_recording(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs, "new", runs, RunStatus(name="new", state="failed"))
    assert main(["compare", "a", "new"]) == 2
    assert "new has no recording to compare" in capsys.readouterr().err
