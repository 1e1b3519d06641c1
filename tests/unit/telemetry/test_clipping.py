"""Data reports and evaluations fit their bounds whatever a run puts into them, and arrive at the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.telemetry import Telemetry
from runtime.telemetry.clipping import (
    BINS_KEPT,
    EXAMPLE_KEPT,
    FILES_KEPT,
    GENERATIONS_KEPT,
    RUNS_KEPT,
    clipped_evaluation,
    clipped_report,
)
from runtime.wire.codec import decode_packet, encode
from runtime.wire.finetuning import DataSample, Generation, TokenRun
from runtime.wire.rundir import Sockets
from tests.harness.fakehub import hello
from tests.harness.finetuning import data_report, evaluation
from tests.harness.telemetryhub import RankHub

LARGEST = 2**20
"""Most bytes of a report or an evaluation; the hub takes frames of 16 times as much."""


@pytest.fixture
def hub(short_folder: Path) -> Iterator[RankHub]:
    hub = RankHub(short_folder)
    yield hub
    hub.close()


def test_they_arrive_as_events(hub: RankHub, short_folder: Path) -> None:
    telemetry = Telemetry(rank=0, attempt=1, sockets=Sockets(short_folder))
    telemetry.data_report(data_report())
    telemetry.evaluation(evaluation(0))
    telemetry.start(hello())
    messages = decode_packet(hub.event_frames()[1]).messages
    telemetry.close(0.2)
    assert messages == [hello(), data_report(), evaluation(0)]


def test_what_is_small_is_sent_as_it_is() -> None:
    assert clipped_report(data_report()) == data_report()
    assert clipped_evaluation(evaluation(5)) == evaluation(5)


def test_a_report_of_any_size_fits() -> None:
    runs = [TokenRun(text="é" * 90, trained=bool(number % 2)) for number in range(50_000)]
    sample = DataSample(source="s" * 9000, tokens=100_000, trained=50_000, runs=runs)
    report = data_report(
        files=[f"{number}" + "f" * 5000 for number in range(300)],
        template="t" * 10**5,
        dropped={f"reason {number}": number for number in range(1, 500)},
        lengths=[(number, 3) for number in range(1, 1000)],
        examples=[sample] * 40,
        notes=["n" * 10**5] * 500,
    )
    clipped = clipped_report(report)
    assert len(encode(clipped)) < LARGEST
    assert len(clipped.files) == FILES_KEPT and clipped.files[-1] == "and 280 more"
    assert sum(clipped.dropped.values()) == sum(report.dropped.values()) and clipped.dropped["reason 499"] == 499
    assert len(clipped.lengths) <= BINS_KEPT and clipped.lengths[-1][0] == 999
    assert sum(count for _, count in clipped.lengths) == 3 * 999
    assert sum(len(run.text) for run in clipped.examples[0].runs) == EXAMPLE_KEPT
    # 16,000 of 4.5 million characters are shown: that share of 100,000 tokens
    assert clipped.examples[0].left_out == 100_000 - round(100_000 * EXAMPLE_KEPT / (90 * 50_000))


def test_an_example_of_very_many_runs_is_cut_too() -> None:
    sample = DataSample(
        source="s", tokens=9000, trained=0, runs=[TokenRun(text="a", trained=False)] * 8000, left_out=1000
    )
    clipped = clipped_report(data_report(examples=[sample])).examples[0]
    assert len(clipped.runs) == RUNS_KEPT and clipped.left_out == 7000


def test_an_evaluation_of_any_size_fits() -> None:
    texts = [Generation(prompt="p" * 10**5, text="é" * 10**5, tokens=7)] * 500
    clipped = clipped_evaluation(evaluation(5).model_copy(update={"generations": texts}))
    assert len(encode(clipped)) < LARGEST and len(clipped.generations) == GENERATIONS_KEPT
    one = clipped_evaluation(evaluation(5).model_copy(update={"generations": texts[:1]}))
    assert "characters left out" in one.generations[0].text and one.generations[0].tokens == 7
