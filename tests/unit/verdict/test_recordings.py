"""Recordings of real runs, replayed into the verdict code: the verdict is right, and it does not flap."""

from __future__ import annotations

import dataclasses
import json
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from benchmarks.verdicts.faults import LIVE_FAULTS
from benchmarks.verdicts.matrix import LOOK_S, judge_replay
from benchmarks.verdicts.recording import Recording, read_recording, recordings, write_recording
from benchmarks.verdicts.replaying import Perturbation, packets, perturbed, repeated
from zerotop.state.run import RunState
from zerotop.verdict.judge import Judge

FILES = {path.name.removesuffix(".jsonl.xz"): path for path in recordings()}
CALM = sorted(name for name, path in FILES.items() if LIVE_FAULTS[read_recording(path).fault].calm)
TEN_MINUTES_S = 600.0
SIZE_BYTES = 10**6


def test_there_are_recordings_of_runs_without_a_fault_and_all_are_small() -> None:
    assert CALM and sum(path.stat().st_size for path in FILES.values()) < SIZE_BYTES


@pytest.mark.parametrize("name", FILES)
def test_a_recording_names_no_machine(name: str) -> None:
    recording = read_recording(FILES[name])
    text = json.dumps([recording.lines, recording.context])
    assert "/tmp" not in text and "/root" not in text and "/home" not in text
    sources = {source.partition("/")[2] for _, source, _ in recording.lines}
    assert sources <= {"", "box", "0", "1"} and recording.loads[1] > 0


@pytest.mark.parametrize("name", FILES)
def test_the_verdict_on_a_recorded_run_is_right_on_other_machines_too(name: str) -> None:
    recording = read_recording(FILES[name])
    for seed in range(2):
        found = judge_replay(recording, LIVE_FAULTS[recording.fault], seed)
        assert found.right and not found.alarms, found


# What a loaded machine does to a run is the harder of the two.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "healthy" else name for name in CALM]
)
def test_ten_minutes_in_which_nothing_is_wrong_change_the_verdict_at_most_once(name: str) -> None:
    state, judge, looked = RunState(), Judge(), 0.0
    told: list[tuple[str, tuple[int, ...]]] = []
    for at_s, packet in packets(repeated(read_recording(FILES[name]), TEN_MINUTES_S)):
        while looked + LOOK_S <= at_s:
            looked += LOOK_S
            found = judge.look(state, looked)
            if found.what != "starting":
                told.append((found.what, found.ranks))
        state.apply_packet(packet)
    assert looked > TEN_MINUTES_S - 10 and state.step > 500
    assert sum(before != after for before, after in pairwise(told)) <= 1, set(told)


# ---- the tools -------------------------------------------------------------------------------------------------------
@pytest.fixture
def recording() -> Recording:
    return read_recording(FILES[CALM[0]])


def test_what_is_written_is_read(recording: Recording, tmp_path: Path) -> None:
    write_recording(tmp_path / "r.jsonl.xz", recording)
    again = read_recording(tmp_path / "r.jsonl.xz")
    assert [list(line) for line in again.lines] == [list(line) for line in recording.lines]
    assert dataclasses.replace(again, lines=[]) == dataclasses.replace(recording, lines=[])


def test_without_a_change_nothing_changes(recording: Recording) -> None:
    lines = perturbed(recording, Perturbation(ranks=(0, 1)))
    assert [(at_s, source) for at_s, source, _ in lines] == [(at_s, source) for at_s, source, _ in recording.lines]
    steps = [one for _, _, messages in recording.lines for one in messages if one["kind"] == "step"]
    changed = [one for _, _, messages in lines for one in messages if one["kind"] == "step"]
    assert [one["step_ms"] for one in changed] == pytest.approx([one["step_ms"] for one in steps], rel=0.001)


def test_ranks_change_places_and_times_are_scaled(recording: Recording) -> None:
    lines = perturbed(recording, Perturbation(ranks=(1, 0), speed=2.0))
    assert lines[-1][0] == pytest.approx(2 * recording.lines[-1][0])

    def durations(of: list[tuple[float, str, list[dict[str, object]]]], rank: int) -> list[int]:
        found = [one for _, _, messages in of for one in messages if one["kind"] == "collectives"]
        return [record[5] for one in found if one["rank"] == rank for record in one["records"]]  # type: ignore[attr-defined]

    before, after = durations(recording.lines, 0), durations(lines, 1)
    assert after == pytest.approx([2 * duration for duration in before], abs=2)


def test_packets_get_lost_but_never_an_introduction(recording: Recording) -> None:
    lines = perturbed(recording, Perturbation(ranks=(0, 1), lost=0.5))
    assert len(lines) < 0.8 * len(recording.lines)
    kinds = [one["kind"] for _, _, messages in lines for one in messages]
    assert kinds.count("hello") == 2


def test_repeated_steps_and_collectives_are_numbered_on(recording: Recording) -> None:
    lines = repeated(recording, 3 * recording.seconds).lines
    assert all(earlier <= later for (earlier, *_), (later, *_) in pairwise(lines))
    for rank in range(2):
        mine = [one for _, _, messages in lines for one in messages if one.get("rank") == rank]
        steps = [one["step"] for one in mine if one["kind"] == "step"]
        new = [step for step, _ in groupby(steps)]  # the state at the beginning repeats one
        assert len(steps) - len(new) <= 1 and all(after == before + 1 for before, after in pairwise(new))
        seqs = [record[0] for one in mine if one["kind"] == "collectives" for record in one["records"]]
        assert sorted(set(seqs)) == list(range(min(seqs), max(seqs) + 1))
        clocks = [one["now_ns"] for one in mine if one["kind"] == "heartbeat"]
        assert all(before < after for before, after in pairwise(clocks))
