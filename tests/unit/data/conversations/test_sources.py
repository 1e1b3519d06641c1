"""Rows of every kind of file, the formats they are recognised as, and files that cannot be used."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from runtime.config import ConfigError
from runtime.data import DataError
from runtime.data.conversations import readers, sources
from runtime.data.conversations.formats import Completion, Conversation, Plain, RowError, parse_row, recognise
from runtime.data.conversations.readers import Reader
from runtime.data.conversations.sources import find_sources

ROWS = [{"text": f"row {number}"} for number in range(5)]


def rows_of(folder: Path, *entries: str) -> list[tuple[int, Any]]:
    reader = Reader(find_sources(entries, folder))
    broken: list[tuple[int, str]] = []
    found = [row for chunk in reader.chunks() for row in chunk.numbered(broken)]
    assert not broken
    return found


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    write_jsonl(tmp_path / "a.jsonl", ROWS)
    lines = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    with arrow.OSFile(str(tmp_path / "c.jsonl.zst"), "wb") as raw, arrow.CompressedOutputStream(raw, "zstd") as out:
        out.write(lines)
    (tmp_path / "d.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "e.json").write_bytes(lines)
    (tmp_path / "f.json").write_text(json.dumps({"version": 1, "data": ROWS}, indent=1))
    (tmp_path / "g.json").write_text(json.dumps(ROWS))
    with (tmp_path / "h.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text"])
        writer.writeheader()
        writer.writerows(ROWS)
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "i.parquet")
    (tmp_path / "j.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n").rstrip())
    for path in sorted(tmp_path.iterdir()):
        assert rows_of(tmp_path, path.name) == list(enumerate(ROWS, 1)), path.name


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert rows_of(tmp_path, "a.txt") == [(1, {"text": "one\ntwo\n"})]


def test_lines_keep_their_numbers_in_small_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 40)
    rows = [{"text": "x" * (number % 50)} for number in range(40)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("\n", "\n\n", 3))
    numbers = [1, 3, 5, *range(7, 44)]
    assert rows_of(tmp_path, "a.jsonl") == list(zip(numbers, rows, strict=True))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert rows_of(tmp_path, "a.jsonl.gz") == list(zip(numbers, rows, strict=True))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_reading_from_a_row_on(tmp_path: Path, name: str) -> None:
    if name == "a.json":
        (tmp_path / name).write_text(json.dumps(ROWS))
    else:
        write_jsonl(tmp_path / "a.jsonl", ROWS)
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    reader = Reader(find_sources([name], tmp_path))
    chunks = list(reader.chunks(0, 3))
    assert [row for chunk in chunks for row in chunk.numbered([])] == list(enumerate(ROWS, 1))[2:]
    assert chunks[0].count() == 3
    assert list(chunks[0].cut(2).numbered([])) == list(enumerate(ROWS, 1))[2:4]


def test_a_file_of_two_entries_counts_with_the_first(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    found = find_sources(["b.jsonl", "*.jsonl"], tmp_path)
    assert [(source.path.name, source.entry) for source in found] == [("b.jsonl", 0), ("a.jsonl", 1)]


def test_a_glob_without_files_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zerotop\.evaluation\.files\[1\].*nothing\.jsonl"):
        write_jsonl(tmp_path / "a.jsonl", ROWS)
        find_sources(["a.jsonl", "nothing.jsonl"], tmp_path, key="zerotop.evaluation.files")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"[1, 2]", "row 1: expected an object, got int"),
        ("a.json", b'[{"text": 1},', "is not JSON: line 1"),
        ("a.json", b'"text"', "holds str, expected an array"),
        ("a.txt", b"\xff\xfe", "not UTF-8 at byte 1"),
        ("a.parquet", b"no parquet at all", "is not a Parquet file"),
        ("a.jsonl.gz", b"no gzip at all", "cannot read"),
        ("a.jsonl", b'{"question": 1, "answer": 2}', r'columns "answer", "question"; expected "messages"'),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        rows_of(tmp_path, name)


def test_a_hub_data_set_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, split: str, streaming: bool) -> Any:
        raise ConnectionError("cannot reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r'"hf://datasets/me/chats" \(split "test"\): ConnectionError: cannot reach'):
        list(Reader(find_sources(["hf://datasets/me/chats"], tmp_path, "test")).chunks())


def test_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(sources, "_hub_sets", {})
    made = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: made)
    assert rows_of(tmp_path, "hf://datasets/me/chats") == list(enumerate(ROWS, 1))


# ---- formats ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (["messages", "id"], "messages"),
        (["conversations", "system"], "sharegpt"),
        (["prompt", "completion"], "prompt-completion"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["text"], "text"),
    ],
)
def test_formats_are_recognised_by_their_columns(columns: list[str], form: str) -> None:
    assert recognise(columns) == form


def test_a_named_format_needs_its_columns() -> None:
    assert recognise(["text", "messages"], "text") == "text"
    with pytest.raises(DataError, match=r'format is "alpaca", which needs .*"instruction" and "output"; x has "text"'):
        recognise(["text"], "alpaca", "x")


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("form", "row", "parsed"),
    [
        ("messages", {"messages": [USER, ASSISTANT]}, Conversation([USER, ASSISTANT])),
        ("messages", {"messages": json.dumps([USER, ASSISTANT])}, Conversation([USER, ASSISTANT])),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}], "name": None}, ASSISTANT]},
            Conversation([USER, ASSISTANT]),
        ),
        (
            "messages",
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
                    },
                ],
                "tools": '[{"type": "function"}]',
            },
            Conversation([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], [{"type": "function"}]),
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            Conversation([{"role": "system", "content": "s"}, USER, ASSISTANT]),
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "r"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            Conversation(
                [
                    USER,
                    {"role": "assistant", "content": "", "tool_calls": [CALL]},
                    {"role": "tool", "content": "r"},
                    ASSISTANT,
                ]
            ),
        ),
        ("prompt-completion", {"prompt": "q", "completion": "a"}, Completion("q", "a")),
        (
            "prompt-completion",
            {"prompt": [USER], "completion": [ASSISTANT]},
            Conversation([USER, ASSISTANT], prompt_messages=1),
        ),
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}, Conversation([USER, ASSISTANT])),
        ("text", {"text": "t"}, Plain("t")),
    ],
)
def test_rows_of_every_format(form: str, row: dict[str, Any], parsed: Any) -> None:
    assert parse_row(row, form, True) == parsed


def test_alpaca_without_a_chat_template() -> None:
    parsed = parse_row({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca", False)
    assert isinstance(parsed, Completion)
    assert parsed.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert parsed.completion == "3"


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("messages", {"messages": []}, "no messages"),
        ("messages", {"messages": None}, "not a list"),
        ("messages", {"messages": [{"content": "x"}]}, "without role"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 'type "image"'),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, 'unknown role "alien"'),
        ("prompt-completion", {"prompt": "x", "completion": None}, "not text"),
        ("prompt-completion", {"prompt": "x", "completion": ""}, "empty completion"),
        ("alpaca", {"instruction": "x", "output": 3}, "not text"),
        ("text", {"text": ""}, "empty text"),
    ],
)
def test_rows_that_are_left_out(form: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse_row(row, form, True)
