"""From the config section to batches: what is kept, cached, held out, weighed and reported, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.config.zerotop import ZerotopConfig
from runtime.data import DataError
from runtime.data.conversations import build
from runtime.data.conversations.batches import IGNORED
from runtime.data.conversations.prepare import PreparedData, prepare_all
from tests.unit.data.conversations.templates import BY_NAME

Made = Callable[..., Any]
CHATML = BY_NAME["chatml"]


def silent(line: str) -> None:
    """For tests that do not look at progress lines."""


def chat(number: int, turns: int = 1) -> dict[str, Any]:
    said = []
    for turn in range(turns):
        said.append({"role": "user", "content": f"question {number} {turn}"})
        said.append({"role": "assistant", "content": f"answer {number} {turn}"})
    return {"messages": said}


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def prepare(make_tokenizer: Made, tmp_path: Path) -> Callable[..., PreparedData]:
    """Prepares files of tmp_path; settings of zerotop.data as keyword arguments."""

    def call(
        tokenizer: Any = None, evaluation: Any = None, seed: int = 0, log: Any = silent, **data: Any
    ) -> PreparedData:
        made = tokenizer or make_tokenizer(CHATML)
        settings = {"files": ["a.jsonl"], "seq_len": 256, **data}
        section = {"data": settings, "evaluation": evaluation, "train": {"seed": seed}}
        return prepare_all(
            ZerotopConfig.model_validate(section), made, len(made), tmp_path, log, cache=tmp_path / "cache"
        )

    return call


def texts_of(prepared: Any, tokenizer: Any) -> list[str]:
    store, plan = prepared.sequences.store, prepared.sequences.plan
    return sorted(
        tokenizer.decode(store.tokens[store.offsets[sample] : store.offsets[sample + 1]].tolist())
        for sample in plan.samples
    )


def test_counts_and_examples(prepare: Callable[..., PreparedData], tmp_path: Path) -> None:
    rows = [chat(number, number % 3 + 1) for number in range(30)]
    rows += [{"messages": [{"role": "user", "content": "alone"}]}] * 2
    write(tmp_path / "a.jsonl", rows)
    made = prepare()
    report = made.train.report
    assert (report.rows, report.samples, report.dropped) == (32, 30, {"no assistant turn": 2})
    assert (report.format, report.train_on, report.packed, report.seq_len) == ("messages", "assistant", True, 256)
    assert sum(count for _, count in report.lengths) == 30
    assert report.sequences == len(made.train.sequences) < 30
    assert report.tokens == len(made.train.sequences.store.tokens)
    trained = [run.text for run in report.examples[0].runs if run.trained]
    assert trained[0].startswith("answer ")
    assert trained[1] == "<|im_end|>"
    edges = sum(run.edge for run in report.examples[0].runs)
    assert edges == len(made.train.sequences.plan.of(0)) - 1
    assert "columns messages: recognised as messages" in report.notes
    assert "2 of 32 rows left out: no assistant turn" in report.notes


def test_the_cache_is_found_again_and_notices_changes(
    prepare: Callable[..., PreparedData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.jsonl", [chat(number) for number in range(5)])
    first = prepare()
    built = []
    real = build._build
    monkeypatch.setattr(build, "_build", lambda *arguments: (built.append(1), real(*arguments)))
    again = prepare()
    assert not built
    assert again.train.report.seconds == 0.0
    assert again.train.digest == first.train.digest
    assert prepare(seed=1).train.sequences.store.folder == first.train.sequences.store.folder
    assert not built
    prepare(seq_len=128)
    write(tmp_path / "a.jsonl", [chat(number) for number in range(6)])
    assert prepare().train.report.samples == 6
    assert len(built) == 2
    assert not list((tmp_path / "cache").glob("*.part"))


def test_processes_make_the_same_store(
    prepare: Callable[..., PreparedData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.data.conversations import readers

    write(tmp_path / "a.jsonl", [chat(number, number % 4 + 1) for number in range(200)])
    alone = prepare().train.sequences.store
    monkeypatch.setattr(readers, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(build, "_ALONE_BYTES", 100)
    (tmp_path / "cache").rename(tmp_path / "old")
    spread = prepare(workers=2).train.sequences.store
    for name in ("tokens", "trained", "lengths", "numbers", "files", "counted"):
        assert np.array_equal(getattr(alone, name), getattr(spread, name)), name
    assert spread.meta["rows"] == 200


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_lines_are_named(
    prepare: Callable[..., PreparedData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    lines = [json.dumps(chat(number)) for number in range(50)]
    lines[20], lines[30], lines[40] = '{"messages": [', "[1]", '{"a" 1}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(build, "_ALONE_BYTES", 1000 if workers > 1 else 1 << 20)
    with pytest.raises(DataError, match=r"a\.jsonl, line 21: Expecting value at column 15; 2 more broken lines"):
        prepare(workers=workers)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_row_that_is_too_long(prepare: Callable[..., PreparedData], tmp_path: Path) -> None:
    long = chat(0, 30)
    late = {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}
    write(tmp_path / "a.jsonl", [chat(1), long, late])
    cut = prepare().train.report
    assert (cut.samples, cut.truncated, cut.dropped) == (2, 1, {"all trained tokens beyond seq_len": 1})
    assert cut.truncated_tokens > 0
    assert any("cut to 256 tokens" in note for note in cut.notes)
    dropped = prepare(overlong="drop").train.report
    assert (dropped.samples, dropped.truncated, dropped.dropped) == (1, 0, {"more than seq_len tokens": 2})
    with pytest.raises(DataError, match=r"a\.jsonl, row 2 has .* tokens, more than zerotop\.data\.seq_len = 256"):
        prepare(overlong="error")


def test_held_out_rows_are_not_trained(
    prepare: Callable[..., PreparedData], make_tokenizer: Made, tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", [chat(number) for number in range(400)])
    tokenizer = make_tokenizer(CHATML)
    made = prepare(evaluation={"split": 0.25})
    assert made.evaluation is not None
    train, held = texts_of(made.train, tokenizer), texts_of(made.evaluation, tokenizer)
    assert sorted(train + held) == texts_of(prepare().train, tokenizer)
    assert 60 < len(held) < 140
    other = prepare(evaluation={"split": 0.25}, seed=1)
    assert other.evaluation is not None
    assert texts_of(other.evaluation, tokenizer) != held
    few = prepare(evaluation={"split": 0.25, "samples": 7})
    assert few.evaluation is not None
    assert set(texts_of(few.evaluation, tokenizer)) < set(held)
    assert few.evaluation.report.samples == 7
    for found in (made, few):
        assert found.train.report.set_aside == {"held out by zerotop.evaluation.split": len(held)}
    assert few.evaluation.report.set_aside == {"beyond zerotop.evaluation.samples = 7": len(held) - 7}
    assert made.evaluation.report.set_aside == {}
    assert texts_of(few.train, tokenizer) == train


def test_every_row_of_a_report_is_accounted_for(prepare: Callable[..., PreparedData], tmp_path: Path) -> None:
    asked = {"messages": [{"role": "user", "content": "Anybody?"}]}
    write(tmp_path / "a.jsonl", [chat(0, 30), asked, *(chat(number) for number in range(60)), chat(0, 40)])
    weighted = prepare(evaluation={"split": 0.3, "samples": 5}, files=["a.jsonl"], weights=[0.5])
    assert weighted.evaluation is not None
    train, held = weighted.train.report, weighted.evaluation.report
    for report in (train, held):
        assert report.rows == report.samples + sum(report.dropped.values()) + sum(report.set_aside.values())
    assert "left out by zerotop.data.weights" in train.set_aside and train.dropped == {"no assistant turn": 1}
    assert held.dropped == {}
    whole = prepare().train.report
    assert (whole.rows, whole.truncated) == (63, 2)
    both = prepare(evaluation={"split": 0.5})
    assert both.evaluation is not None
    parts = (both.train.report, both.evaluation.report)
    assert sum(report.truncated for report in parts) == 2
    assert sum(report.truncated_tokens for report in parts) == whole.truncated_tokens


def test_evaluation_on_files(prepare: Callable[..., PreparedData], tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [chat(number) for number in range(4)])
    write(tmp_path / "b.jsonl", [chat(9)])
    made = prepare(evaluation={"files": ["b.jsonl"]})
    assert made.evaluation is not None
    assert (made.evaluation.report.role, made.evaluation.report.samples) == ("evaluation", 1)
    assert made.train.report.samples == 4
    with pytest.raises(Exception, match=r"zerotop\.evaluation\.files\[0\]"):
        prepare(evaluation={"files": ["none.jsonl"]})


def test_a_split_that_leaves_nothing(prepare: Callable[..., PreparedData], tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [chat(1)])
    with pytest.raises(DataError, match=r"zerotop\.evaluation\.split: 0\.001 of 1 samples leaves 0"):
        prepare(evaluation={"split": 0.001})


def test_weights_repeat_and_thin_out(
    prepare: Callable[..., PreparedData], make_tokenizer: Made, tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", [chat(number) for number in range(100)])
    write(tmp_path / "b.jsonl", [chat(1000 + number) for number in range(100)])
    made = prepare(files=["a.jsonl", "b.jsonl"], weights=[2, 0.5])
    texts = texts_of(made.train, make_tokenizer(CHATML))
    first = [text for text in texts if "question 10" not in text or "question 10 0" in text]
    second = [text for text in texts if text not in first]
    assert len(first) == 200
    assert 30 < len(second) < 70
    assert len(set(second)) == len(second)
    with pytest.raises(DataError, match=r"weights has 1 numbers, but zerotop\.data\.files has 2 entries"):
        prepare(files=["a.jsonl", "b.jsonl"], weights=[2])


def test_text_gets_the_tokenizers_ends_and_documents_are_not_cut_off(
    prepare: Callable[..., PreparedData], make_tokenizer: Made, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    write(tmp_path / "a.jsonl", [{"text": "the quick fox"}])
    made = prepare(tokenizer)
    store = made.train.sequences.store
    assert store.tokens.tolist() == [*tokenizer("the quick fox")["input_ids"], tokenizer.eos_token_id]
    assert store.trained.all()
    assert made.train.report.train_on == "all"
    (tmp_path / "b.txt").write_text("a long document " * 100)
    whole = prepare(tokenizer, files=["b.txt"], seq_len=64)
    tokens = whole.train.sequences.store.tokens.tolist()
    assert tokens == [*tokenizer("a long document " * 100)["input_ids"], tokenizer.eos_token_id]
    assert whole.train.report.truncated == 0
    assert whole.train.report.samples == -(-len(tokens) // 64)


def test_completions_are_trained_and_prompts_are_not(
    prepare: Callable[..., PreparedData], make_tokenizer: Made, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    write(tmp_path / "a.jsonl", [{"prompt": "What?\n", "completion": "That."}])
    store = prepare(tokenizer).train.sequences.store
    trained = [token for token, is_trained in zip(store.tokens, store.trained, strict=True) if is_trained]
    assert tokenizer.decode(trained) == "That.</s>"
    assert tokenizer.decode(store.tokens.tolist()) == "What?\nThat.</s>"


def test_several_formats_in_one_run(prepare: Callable[..., PreparedData], tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [chat(1)])
    write(tmp_path / "b.jsonl", [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}])
    report = prepare(files=["*.jsonl"]).train.report
    assert (report.format, report.samples) == ("messages, sharegpt", 2)


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([], {}, r"zerotop\.data\.files: no rows in .*a\.jsonl"),
        (
            [{"messages": [{"role": "user", "content": "x"}]}] * 3,
            {},
            r'all 3 rows were left out \(no assistant turn: 3\); expected messages with the role "assistant"',
        ),
        ([{"text": "x y"}], {"train_on": "assistant"}, r'train_on is "assistant", but text has no turns'),
        ([chat(1)], {"chat_template": "none.jinja"}, r"chat_template: cannot read .*none\.jinja: No such file"),
        ([chat(1)], {"chat_template": "bad.jinja"}, r"bad\.jinja is not a Jinja template: "),
        ([chat(1)], {"chat_template": "raise.jinja"}, r"the chat template refuses: 1\).*no system here"),
        (
            [chat(1)],
            {"chat_template": "mute.jinja"},
            r"(?s)1 rows with turns not found.*the template\nnothing is said\n.*rows\nnothing is said",
        ),
        ([chat(1)], {"files": []}, r"zerotop\.data\.files is empty"),
    ],
)
def test_data_that_cannot_be_used(
    prepare: Callable[..., PreparedData], tmp_path: Path, rows: list[Any], settings: dict[str, Any], said: str
) -> None:
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "bad.jinja").write_text("{% for %}")
    (tmp_path / "raise.jinja").write_text("{{ raise_exception('no system here') }}")
    (tmp_path / "mute.jinja").write_text("nothing is said")
    with pytest.raises(DataError, match=said):
        prepare(**settings)


def test_a_base_model_without_template(
    prepare: Callable[..., PreparedData], make_tokenizer: Made, tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", [chat(1)])
    with pytest.raises(DataError, match=r"no chat template .* name a file with one in zerotop\.data\.chat_template"):
        prepare(make_tokenizer())
    (tmp_path / "own.jinja").write_text(CHATML.template)
    report = prepare(make_tokenizer(), chat_template="own.jinja").train.report
    assert report.template.endswith("own.jinja")


def test_a_tokenizer_that_is_larger_than_the_embedding(make_tokenizer: Made, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [chat(1)])
    tokenizer = make_tokenizer(CHATML)
    section = ZerotopConfig.model_validate({"data": {"files": ["a.jsonl"]}})
    with pytest.raises(DataError, match=rf"largest token id is {len(tokenizer) - 1}, but .* only 100 rows"):
        prepare_all(section, tokenizer, 100, tmp_path, silent, cache=tmp_path / "cache")


def test_a_template_that_only_transformers_renders_right(
    prepare: Callable[..., PreparedData], make_tokenizer: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our rendering is compared with the tokenizer's, whose one is used where they differ."""
    from runtime.data.conversations.template import Renderer

    real = Renderer.__call__
    monkeypatch.setattr(Renderer, "__call__", lambda self, *rest, **named: real(self, *rest, **named) + "!")
    write(tmp_path / "a.jsonl", [chat(1)])
    tokenizer = make_tokenizer(CHATML)
    store = prepare(tokenizer).train.sequences.store
    assert store.tokens.tolist() == tokenizer.apply_chat_template(chat(1)["messages"])["input_ids"]


def test_progress_is_logged(
    prepare: Callable[..., PreparedData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.data.conversations import readers

    monkeypatch.setattr(readers, "CHUNK_BYTES", 1000)
    seconds = iter(range(10_000))
    monkeypatch.setattr(build.time, "monotonic", lambda: float(next(seconds)))
    write(tmp_path / "a.jsonl", [chat(number) for number in range(30)])
    lines: list[str] = []
    prepare(log=lines.append)
    assert any(line.startswith("tokenizing: ") and line.endswith(" s left") for line in lines)
    assert lines[-1].startswith("tokenized 30 rows into ")


# ---- streamed data ---------------------------------------------------------------------------------------------------
def stream_of(made: PreparedData, steps: range, tokenizer: Any, rank: int = 0, world: int = 1) -> list[list[str]]:
    batches = made.batches(2, 1, rank, world)
    try:
        return [texts(batches, step, tokenizer) for step in steps]
    finally:
        batches.close()


def texts(batches: Any, step: int, tokenizer: Any) -> list[str]:
    made = list(batches.micro_batches(step))
    counted = sum(int((batch.targets != IGNORED).sum()) for batch in made)
    assert batches.world > 1 or counted == batches.trained_tokens(step)
    return [tokenizer.decode(row.tolist()) for batch in made for row in batch.tokens]


def test_streamed_segments_are_the_data_once_an_epoch(
    prepare: Callable[..., PreparedData], make_tokenizer: Made, tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", [chat(number) for number in range(5)])
    write(tmp_path / "b.jsonl", [chat(number) for number in range(5, 8)])
    tokenizer = make_tokenizer(CHATML)
    made = prepare(files=["*.jsonl"], streaming=True, segment_rows=3, packing=False)
    assert not made.train.report.complete
    seen = stream_of(made, range(8), tokenizer)
    flat = [text.split("question ")[1].split(" ")[0] for step in seen for text in step]
    assert sorted(flat[:8]) == sorted(flat[8:]) == [str(number) for number in range(8)]
    assert sorted(flat[:3]) == ["0", "1", "2"]
    both = [stream_of(made, range(4), tokenizer, rank, 2) for rank in range(2)]
    assert [one + two for one, two in zip(*both, strict=True)] == [
        seen[2 * step] + seen[2 * step + 1] for step in range(4)
    ]


def test_streamed_data_resumes_where_it_was(
    prepare: Callable[..., PreparedData], make_tokenizer: Made, tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", [chat(number) for number in range(11)])
    tokenizer = make_tokenizer(CHATML)
    made = prepare(streaming=True, segment_rows=4, packing=False)
    batches = made.batches(2, 1, 0, 1)
    seen = [texts(batches, step, tokenizer) for step in range(7)]
    state = json.loads(json.dumps(batches.state_dict()))
    assert len(state["segments"]) <= 3
    following = [texts(batches, step, tokenizer) for step in range(7, 9)]
    batches.close()
    kept = list((tmp_path / "cache").glob("segment-*[0-9a-f]"))
    assert len(kept) <= 4
    resumed = made.batches(2, 1, 0, 1)
    resumed.load_state_dict(state)
    assert [texts(resumed, step, tokenizer) for step in range(7, 9)] == following
    assert texts(resumed, 1, tokenizer) == seen[1]
    resumed.close()


def test_broken_lines_in_a_later_segment(prepare: Callable[..., PreparedData], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(chat(1)) + "\n" + json.dumps(chat(2)) + "\n{\n")
    made = prepare(streaming=True, segment_rows=2, packing=False)
    batches = made.batches(2, 1, 0, 1)
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: "):
        for step in range(2):
            list(batches.micro_batches(step))
    batches.close()
