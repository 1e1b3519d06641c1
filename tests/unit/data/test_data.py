"""Text to tokens to micro-batches: the cache is built once, and the order is a pure function of seed and step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.config import ConfigError
from runtime.config.vocab import count_tokens
from runtime.data import DataError
from runtime.data.corpus import default_files, load_text
from runtime.data.order import Batch, Batches, Order, shuffled
from runtime.data.tokenizer import ByteTokenizer, load_tokenizer
from runtime.data.tokens import HEADER_BYTES, PIECE_BYTES, TokenDataset, cache_folder, read_header, token_file
from tests.harness.waiting import patient


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zerotop" / "tokens"


def silent(line: str) -> None:
    """For tests that do not look at progress lines."""


def dataset_of(tmp_path: Path, text: bytes, seq_len: int) -> TokenDataset:
    (tmp_path / "text.txt").write_bytes(text)
    return TokenDataset(token_file([tmp_path / "text.txt"], ByteTokenizer(), silent), seq_len)


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> Path:
    pytest.importorskip("tokenizers")
    vocab = {"[UNK]": 0, "a": 1, "b": 2, "line": 3}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document = {
        "version": "1.0",
        "added_tokens": [{"id": 4, "content": "</s>", "special": True, **flags}],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    }
    document |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


# ---- order -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 65, 1000])
def test_shuffled_is_a_permutation(count: int) -> None:
    assert sorted(shuffled(position, count, key=5) for position in range(count)) == list(range(count))


def test_shuffled_spreads_evenly() -> None:
    """Where the first position goes over many keys: no place is preferred (chi-squared, 15 degrees, far tail)."""
    places = Counter(shuffled(0, 16, key) for key in range(4000))
    assert sum((places[place] - 250) ** 2 / 250 for place in range(16)) < 45


def test_every_window_comes_once_an_epoch_and_epochs_differ() -> None:
    order = Order(seed=3, windows=101, global_batch=7)
    stream = [order.window(sample) for sample in range(303)]
    epochs = [stream[start : start + 101] for start in (0, 101, 202)]
    assert all(sorted(epoch) == list(range(101)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream != [Order(seed=4, windows=101, global_batch=7).window(sample) for sample in range(303)]


@pytest.mark.parametrize(
    ("world", "micro_batch", "accumulation"), [(1, 12, 1), (2, 3, 2), (3, 1, 4), (4, 3, 1), (6, 2, 1)]
)
def test_the_global_batch_does_not_depend_on_how_it_is_split(world: int, micro_batch: int, accumulation: int) -> None:
    order = Order(seed=1, windows=50, global_batch=12)
    for step in (0, 4, 1000):
        split = [
            index
            for micro in range(accumulation)
            for rank in range(world)
            for index in order.indices(step, micro, rank, micro_batch=micro_batch, world=world)
        ]
        assert split == [order.window(sample) for sample in range(step * 12, step * 12 + 12)]


def test_batches_hold_the_text_and_targets_are_one_on(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, bytes(range(256)) * 4, seq_len=16)
    batches = Batches(dataset, Order(0, len(dataset), 8), micro_batch=2, accumulation=2, rank=1, world=2)
    micro_batches = list(batches.micro_batches(step=3))
    assert len(micro_batches) == 2
    for tokens, targets in micro_batches:
        assert tokens.shape == targets.shape == (2, 16)
        assert tokens.dtype == targets.dtype == torch.int64
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        assert bool((((targets[:, -1] - tokens[:, -1]) % 256 == 1) | (targets[:, -1] == 256)).all())
    again = list(batches.micro_batches(step=3))
    assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(micro_batches, again, strict=True))


def test_batch_to_returns_a_batch_on_the_device() -> None:
    batch = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert moved.tokens.device.type == moved.targets.device.type == "meta"


def test_batch_arithmetic_that_does_not_multiply_is_refused(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, b"x" * 100, seq_len=8)
    with pytest.raises(DataError, match=r"train_batch_size \(9\) != .*= 8"):
        Batches(dataset, Order(0, len(dataset), 9), micro_batch=2, accumulation=2, rank=0, world=2)


def test_a_micro_batch_is_fetched_in_well_under_a_millisecond(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, b"0123456789" * 100_000, seq_len=256)
    batches = Batches(dataset, Order(0, len(dataset), 8), micro_batch=4, accumulation=1, rank=0, world=2)
    taken_s = []
    for step in range(50):
        start = time.perf_counter()
        batches.micro_batch_at(step, 0)
        taken_s.append(time.perf_counter() - start)
    assert min(taken_s) < 0.5e-3


# ---- token files -----------------------------------------------------------------------------------------------------
def test_documents_are_separated_by_the_end_of_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "c").write_bytes(b"\xff\x00")
    path = token_file([tmp_path / name for name in "abc"], ByteTokenizer(), silent)
    stored = np.fromfile(path, np.uint16, offset=HEADER_BYTES)
    assert stored.tolist() == [*b"one", 256, 256, 0xFF, 0, 256]
    assert read_header(path)["documents"] == 3


def test_windows_cover_the_text_with_one_shared_token(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, bytes(range(30)), seq_len=10)
    assert (dataset.token_count, len(dataset), dataset.vocab_size, dataset.eot) == (31, 3, 257, 256)
    assert dataset.rows([2, 0]).tolist() == [[*range(20, 30), 256], list(range(11))]
    with pytest.raises(IndexError, match="window 3 of 3"):
        dataset.rows([3])


@pytest.mark.parametrize("filler", [b"x", "€".encode(), b"\x80", b"line\n"], ids=["ascii", "euro", "not-utf8", "lines"])
@pytest.mark.parametrize("extra", [-1, 0, 1, 2 * PIECE_BYTES + 5])
def test_large_documents_are_cut_without_losing_a_byte(tmp_path: Path, filler: bytes, extra: int) -> None:
    text = (filler * (2 * PIECE_BYTES))[: PIECE_BYTES + extra]
    (tmp_path / "big").write_bytes(text)
    path = token_file([tmp_path / "big"], ByteTokenizer(), silent)
    stored = np.fromfile(path, np.uint16, offset=HEADER_BYTES)
    assert stored[-1] == 256
    assert stored[:-1].astype(np.uint8).tobytes() == text


def test_a_changed_file_or_tokenizer_gives_another_token_file(tmp_path: Path, tokenizer_json: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"a b line")
    first = token_file([text], ByteTokenizer(), silent)
    assert token_file([text], ByteTokenizer(), silent) == first
    assert token_file([text], load_tokenizer(str(tokenizer_json)), silent) != first
    text.write_bytes(b"a b lines")
    second = token_file([text], ByteTokenizer(), silent)
    assert second != first
    assert read_header(second)["digest"] != read_header(first)["digest"]


def test_a_cut_short_token_file_is_built_again(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"some text")
    path = token_file([text], ByteTokenizer(), silent)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="cut short"):
        TokenDataset(path, 4)
    assert token_file([text], ByteTokenizer(), silent).read_bytes() == whole


_BUILDER = """
import sys
from pathlib import Path
from runtime.data.tokenizer import ByteTokenizer
from runtime.data.tokens import token_file
class Slow(ByteTokenizer):
    def encode(self, pieces):
        with open(sys.argv[2], "a") as log: log.write("built\\n")
        import time; time.sleep(0.5)
        return super().encode(pieces)
sys.stdin.readline()
print(token_file([Path(sys.argv[1])], Slow(), lambda line: print(line, file=sys.stderr)))
"""


def test_of_several_processes_one_builds_and_the_others_wait(tmp_path: Path, own_cache: Path) -> None:
    text, log = tmp_path / "text", tmp_path / "log"
    text.write_bytes(b"text" * 1000)
    command = [sys.executable, "-c", _BUILDER, str(text), str(log)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(3)]
    for process in processes:  # all are past their imports only when they read this; then they race for the lock
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=patient(60)) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], answers
    assert log.read_text() == "built\n"
    assert len({out for out, _ in answers}) == 1
    assert [path.suffix for path in own_cache.iterdir() if path.suffix not in (".bin", ".lock")] == []


def test_progress_lines_come_once_a_second_with_a_percentage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("runtime.data.tokens.time.monotonic", lambda: float(next(clock)))
    for name in "abcd":
        (tmp_path / name).write_bytes(b"one\n")
    lines: list[str] = []
    token_file([tmp_path / name for name in "abcd"], ByteTokenizer(), lines.append)
    assert [line.split(": ")[1].split("%")[0] for line in lines[:-1]] == ["25", "50", "75"]
    assert "tokenized 4 files into 20 tokens" in lines[-1]


# ---- what can be wrong -----------------------------------------------------------------------------------------------
def test_too_short_a_text_names_both_ways_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"5 tokens, .*seq_len \+ 1 = 9; .*data\.files or lower .*seq_len"):
        dataset_of(tmp_path, b"text", seq_len=8)


def test_a_glob_that_matches_nothing_names_itself_and_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zerotop\.data\.files\[0\].*nothing\*\.txt.*") as caught:
        load_text(["nothing*.txt"], "bytes", 8, tmp_path, silent)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, own_cache: Path) -> None:
    own_cache.mkdir(parents=True)
    own_cache.chmod(0o500)
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        dataset_of(tmp_path, b"text", seq_len=2)


def test_a_cache_folder_that_is_a_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot write .*XDG_CACHE_HOME"):
        dataset_of(tmp_path, b"text", seq_len=2)


def test_a_missing_tokenizer_names_the_key_and_the_choices(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"zerotop\.data\.tokenizer: cannot read .*nowhere.*\"bytes\""):
        load_tokenizer("nowhere", tmp_path)


def test_a_missing_library_says_how_to_get_it(tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match="pip install tokenizers"):
        load_tokenizer(str(tokenizer_json))


def test_a_file_that_is_no_tokenizer_says_so(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        load_tokenizer("tokenizer.json", tmp_path)


# ---- tokenizers and the default text ---------------------------------------------------------------------------------
def test_hugging_face_tokens_with_replaced_characters_counted(tmp_path: Path, tokenizer_json: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_json))
    assert (tokenizer.vocab_size, tokenizer.eot) == (5, 4)
    assert count_tokens(str(tokenizer_json), tmp_path) == 5
    (tmp_path / "text").write_bytes(b"a line\nb \xff\xfe a")
    lines: list[str] = []
    path = token_file([tmp_path / "text"], tokenizer, lines.append)
    assert np.fromfile(path, np.uint16, offset=HEADER_BYTES).tolist() == [1, 3, 2, 0, 1, 4]
    assert read_header(path)["replaced_characters"] == 2
    assert any("2 characters were replaced" in line for line in lines)


def test_bytes_round_trip() -> None:
    text = "naïve €\n"
    (tokens,), replaced = ByteTokenizer().encode([text.encode()])
    assert replaced == 0
    assert ByteTokenizer().decode([*tokens, 256]) == text
    assert ByteTokenizer.vocab_size == count_tokens("bytes", Path())


def test_the_default_text_is_the_standard_library_without_its_tests() -> None:
    files = default_files()
    assert files == sorted(files)
    names = {path.name for path in files}
    assert {"argparse.py", "decoder.py"} <= names
    assert not any("test" in path.parts or "site-packages" in path.parts for path in files)
    assert sum(path.stat().st_size for path in files) > 5_000_000


def test_cache_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "zerotop" / "tokens"
