"""Data reports as lines: figures, histograms, and examples that lose no character and mix up no mark."""

from __future__ import annotations

import random

import pytest
from rich.cells import cell_len

from runtime.wire.finetuning import DataSample, TokenRun
from tests.harness.finetuning import data_report, token_runs
from zerotop.state.material import Piece, example_lines, facts, histogram, packing_fill, title


def sample(*runs: TokenRun, left_out: int = 0) -> DataSample:
    return DataSample(source="row 1", tokens=9, trained=3, runs=list(runs), left_out=left_out)


def test_the_figures_of_a_report() -> None:
    told = dict(facts(data_report()))
    assert (told["format"], told["template"]) == ("messages, text", "the tokenizer's (smollm2)")
    assert told["files"] == "chats/part-*.jsonl, notes.txt"
    assert told["trained on"] == "assistant: 468K of 1.31M tokens, 36%"
    assert told["samples"] == "7,105 of 7,168 rows"
    assert told["sequences"] == "655 of 2,048 tokens, packed, 98% full"
    assert told["truncated"] == "31 samples, 4.21K tokens cut off"
    assert told["dropped"] == "51 without an assistant turn, 12 empty"
    held = dict(facts(data_report(set_aside={"held out by zerotop.evaluation.split": 40})))
    assert held["set aside"] == "40 held out by zerotop.evaluation.split" and "set aside" not in told
    assert title(data_report()) == "training data"
    plain = dict(facts(data_report("evaluation", packed=False, complete=False, seconds=0.0)))
    assert {"truncated", "dropped", "prepared in"}.isdisjoint(plain)
    assert plain["sequences"] == "21 of 2,048 tokens at most, not packed"
    assert plain["samples"] == "200 of 200 rows in the first segment; the stream goes on"
    assert title(data_report(complete=False)) == "training data: first segment of a stream"


def test_an_empty_report_divides_by_nothing() -> None:
    empty = data_report(tokens=0, trained_tokens=0, sequences=0, samples=0, lengths=[], files=[])
    assert packing_fill(empty) is None
    assert dict(facts(empty))["trained on"] == "assistant: 0 of 0 tokens, n/a"
    assert histogram(empty.lengths, 80, 6) == [] == histogram([(5, 0)], 80, 6)


def test_a_histogram_to_scale() -> None:
    assert histogram([(8, 1), (16, 4), (24, 2), (32, 0)], 40, 3) == [
        "4┤      █████",
        "0┤▄▄▄▄▄ █████ █████",
        " └≤ 8          ≤ 32 tokens",
    ]


@pytest.mark.parametrize("width", [14, 20, 33, 60, 200])
@pytest.mark.parametrize("count", [1, 2, 5, 31, 32])
def test_a_histogram_fits_every_width_and_hides_no_sample(width: int, count: int) -> None:
    lengths = [(10 * (bar + 1), 1 if bar else 1_000_000) for bar in range(count)]
    rows = histogram(lengths, width, 5)
    assert len(rows) == 5 and all(len(row) <= width for row in rows)
    bottom = rows[-2].split("┤")[1]
    assert "▁" in bottom or count == 1


def test_an_example_in_lines() -> None:
    lines = example_lines(sample(*token_runs(0, 1)), 40)
    assert lines[:5] == [
        [Piece("<|im_start|>", "special"), Piece("user↵", "context")],
        [Piece("What is the tallest mountain?", "context"), Piece("<|im_end|>", "special"), Piece("↵", "context")],
        [Piece("<|im_start|>", "special"), Piece("assistant↵", "context")],
        [Piece("Mount Everest, at 8,849 metres above sea", "trained")],
        [Piece(" level.", "trained"), Piece("<|im_end|>", "trained special"), Piece("↵", "context")],
    ]
    edges = [line for line in lines if line[0].kind == "edge"]
    assert len(edges) == 1 and "next document" in edges[0][0].text


def test_what_is_left_out_is_said_and_controls_are_not_shown() -> None:
    lines = example_lines(sample(TokenRun(text="a\x1b[2Jb\u202ec\td", trained=True), left_out=1200), 40)
    assert lines == [[Piece("abc    d", "trained")], [Piece("… 1,200 tokens more", "note")]]


def test_no_character_is_lost_or_marked_wrongly_at_any_width() -> None:
    chooser = random.Random(3)
    for _ in range(60):
        runs = [
            TokenRun(
                text="".join(chooser.choices("ab  \n你好é", k=chooser.randrange(1, 60))),
                trained=chooser.random() < 0.5,
            )
            for _ in range(6)
        ]
        width = chooser.randrange(4, 70)
        lines = example_lines(sample(*runs), width)
        assert all(sum(cell_len(piece.text) for piece in line) <= width for line in lines)
        for trained, kind in ((True, "trained"), (False, "context")):
            shown = "".join(piece.text for line in lines for piece in line if piece.kind == kind)
            assert shown == "".join(run.text for run in runs if run.trained is trained).replace("\n", "↵")


def test_an_absolute_path_is_shown_by_its_end() -> None:
    report = data_report("train").model_copy(update={"files": ["/home/me/project/chats.jsonl", "hf://datasets/a/b"]})
    assert dict(facts(report))["files"] == "project/chats.jsonl, hf://datasets/a/b"
