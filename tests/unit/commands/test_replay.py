"""zerotop replay without a screen: tables, pictures, casts, and what is asked wrongly."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runtime.wire.messages import RunStatus
from tests.harness.fakerun import write_run
from tests.harness.longrun import BEGIN_S, SpokenRun, write
from zerotop.cli import main


@pytest.fixture
def run(home: Path) -> Path:
    """The run q1, which has ended, with a recording of a minute."""
    path = write_run(home, "q1", home, RunStatus(name="q1", state="finished", attempt=1, step=60))
    spoken = SpokenRun()
    for _ in range(60):
        spoken.second()
    return write(path, spoken)


def test_the_document_says_what_the_recording_holds(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "q1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["name"] == "q1" and document["frames"] == 61 and document["begin_wall_s"] == BEGIN_S
    assert document["stretches"] == [
        {"begin_wall_s": BEGIN_S, "end_wall_s": BEGIN_S + 61, "spacing_s": 1, "frames": 61}
    ]
    assert document["events"] == 3 and document["bytes"] > 10_000 and document["written"] == []


def test_a_range_as_csv(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "steps.csv"
    assert main(["replay", "q1", "--csv", str(target), "--from", "10", "--to", "20", "--json"]) == 0
    with target.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(10, 21))
    assert json.loads(capsys.readouterr().out)["written"] == [{"file": str(target), "table": "steps", "rows": 11}]
    assert main(["replay", "q1", "--csv", "-", "--table", "ranks", "--from=-5s"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("wall_s,attempt,rank,phase") and len(out) in (11, 13)


def test_a_range_as_parquet(run: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    target = tmp_path / "steps.parquet"
    assert main(["replay", "q1", "--parquet", str(target)]) == 0
    table = parquet.read_table(target)
    assert table.num_rows == 60 and str(table.schema.field("loss").type) == "double"
    assert str(table.schema.field("evaluation_loss").type) == "double"


def test_parquet_that_cannot_be_written_is_one_message(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    assert main(["replay", "q1", "--parquet", "/nowhere/x.parquet"]) == 1
    said = capsys.readouterr().err
    assert "/nowhere/x.parquet" in said and "Traceback" not in said


def test_a_picture_and_a_cast(run: Path, tmp_path: Path) -> None:
    svg, cast = tmp_path / "s.svg", tmp_path / "s.cast"
    assert main(["replay", "q1", "--svg", str(svg), "--at", "30", "--size", "100x30"]) == 0
    assert "REPLAY" in svg.read_text() and "<svg" in svg.read_text()
    assert main(["replay", "q1", "--cast", str(cast), "--from", "10", "--to", "14", "--size", "80x24"]) == 0
    header, *pictures = [json.loads(line) for line in cast.read_text().splitlines()]
    assert (header["version"], header["width"], header["height"]) == (2, 80, 24)
    assert [kind for _, kind, _ in pictures] == ["o"] * len(pictures) and len(pictures) == 5
    times = [at for at, _, _ in pictures]
    assert times == sorted(times) and times[0] == 0 and times[-1] == 4
    assert "frame" in pictures[0][2] and len(pictures[1][2]) < len(pictures[0][2])  # only lines that changed


def test_a_png_is_drawn_by_a_program_that_is_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "s.png"
    if shutil.which("rsvg-convert"):
        assert main(["replay", "q1", "--png", str(target)]) == 0
        assert target.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["replay", "q1", "--png", str(target)]) == 2
    assert "apt install librsvg2-bin, or use --svg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--csv", "-", "--at", "soon"], "--at: 'soon' is not a moment: expected a step"),
        (["--csv", "-", "--from", "999"], "--from: the recording has no step 999"),
        (["--csv", "-", "--from", "40", "--to", "20"], "--to 20 is before --from 40"),
        (["--svg", "x.svg", "--size", "big"], "--size: expected columns x lines"),
        (["--svg", "x.png"], "--svg x.png: expected a file that ends with .svg"),
        (["--csv", "/nowhere/x.csv"], "can't write /nowhere/x.csv"),
        (["--cast", "x", "--speed", "0"], "--speed: expected 0.25 to 600, got 0"),
        (["--csv", "-", "--json"], "both write to stdout"),
        ([], "replay draws a screen and needs a terminal"),
    ],
)
def test_what_is_asked_wrongly_is_one_message(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["replay", "q1", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_on_another_machine_says_how(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "me@box:q1"]) == 2
    assert "ssh -t me@box zerotop replay q1" in capsys.readouterr().err


def test_a_run_without_a_recording(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(home, "q2", home, RunStatus(name="q2", state="failed"))
    assert main(["replay", "q2", "--json"]) == 2
    answer: Any = json.loads(capsys.readouterr().out)
    assert "q2 has no recording" in answer["error"]
