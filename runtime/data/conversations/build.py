"""Builds stores: sends chunks of rows to processes that encode them, and puts their results together."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.data import DataError
from runtime.data.cache import Log, build_lock, part_name, sync_folder
from runtime.data.conversations import store, worker
from runtime.data.conversations.chunks import Chunk
from runtime.data.conversations.encode import EMPTY_MASK, FULL_MASK, NO_TURN, TURNS_NOT_FOUND, Encoder, Recipe
from runtime.data.conversations.readers import Reader
from runtime.data.conversations.sources import Source
from runtime.host.cores import read_machine

_ALONE_BYTES = 6 << 20
"""Bytes of data that are worth a process: starting one takes about a second."""
_WRONG_SHARE = 0.01
"""Rows whose mask is empty or full, of all: more of them are an error, as no mask is then to be trusted."""


def build_store(
    path: Path,
    reader: Reader,
    recipe: Recipe,
    workers: int,
    log: Log,
    chunks: Iterable[Chunk] | None = None,
    end: dict[str, Any] | None = None,
) -> store.Store:
    """The store at `path`, which is built if it does not exist yet; one process builds and others wait.

    chunks: only these of the reader's, in this process unless `workers` says otherwise. end: what is known when they
    have been read and becomes part of the store's meta; such a store, a segment of a stream, may be empty.

    Raises DataError for data that cannot be used and for a cache that cannot be written.
    """
    if not store.is_complete(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with build_lock(path.with_suffix(".lock"), log, "the prepared data") as alone:
                if not store.is_complete(path):
                    if alone:
                        for left_over in path.parent.glob(f"{path.name}.*.part"):
                            shutil.rmtree(left_over, ignore_errors=True)
                        shutil.rmtree(path, ignore_errors=True)
                    _build(path, reader, recipe, workers, log, chunks, end)
        except OSError as error:
            raise DataError(
                f"cannot write prepared data in {path.parent}: {error.strerror or error}; "
                "set XDG_CACHE_HOME to a folder with room for it"
            ) from None
    return store.Store(path)


def _build(
    path: Path,
    reader: Reader,
    recipe: Recipe,
    workers: int,
    log: Log,
    chunks: Iterable[Chunk] | None,
    end: dict[str, Any] | None,
) -> None:
    part = part_name(path)
    pieces = part / "pieces"
    pieces.mkdir(parents=True)
    start = time.monotonic()
    total = sum(source.size for source in reader.sources) if chunks is None else 0
    progress = _Progress(total, log)
    try:
        outcomes: list[worker.Outcome] = []
        problems = _Problems(reader.sources)
        todo = iter(chunks) if chunks is not None else reader.chunks()
        count = _processes(workers, total, reader) if chunks is None else workers
        alone = count <= 1
        run = _run_alone(todo, recipe, pieces, problems) if alone else _run(todo, recipe, pieces, problems, count)
        with contextlib.closing(run):
            for outcome, weight in run:
                problems.add(outcome)
                outcomes.append(outcome)
                progress.add(weight, outcome)
        problems.check()
        outcomes.sort(key=lambda outcome: outcome.number)
        meta = _summary(outcomes, reader, recipe)
        if end is not None:
            meta.update(end)
        _check_usable(meta, outcomes, reader, recipe, may_be_empty=end is not None)
        meta["seconds"] = round(time.monotonic() - start, 3)
        _assemble(part, pieces, outcomes, meta)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync_folder(path.parent)
    progress.done(meta["tokens"], meta["rows"])


def _cpus() -> int:
    """Logical CPUs, no more than the quota pays for."""
    machine = read_machine()
    return max(1, int(min(sum(len(core.cpus) for core in machine.cores), machine.quota_cpus)))


def _processes(workers: int, total: int, reader: Reader) -> int:
    """How many processes encode; with one it is this one, which is quicker for data that is not much."""
    known = all(source.size and source.path.suffix not in (".gz", ".zst") for source in reader.sources)
    worth = -(-total // _ALONE_BYTES) if known else 1 << 10
    return min(workers or _cpus(), worth)


class _Problems:
    """Broken lines and other errors, told together when all chunks have been looked at."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._first: tuple[int, int, str] | None = None  # (chunk, line, problem)
        self._source = 0
        self.count = 0
        self._error: tuple[int, int, str] | None = None  # (chunk, source, message)

    def add(self, outcome: worker.Outcome) -> None:
        self.count += outcome.broken_count
        if outcome.broken and (self._first is None or outcome.number < self._first[0]):
            self._first, self._source = (outcome.number, *outcome.broken[0]), outcome.source
        if outcome.error and (self._error is None or outcome.number < self._error[0]):
            self._error = (outcome.number, outcome.source, outcome.error)

    @property
    def failed(self) -> bool:
        return self._first is not None or self._error is not None

    @property
    def stop(self) -> bool:
        """Whether there is nothing more to find out: only broken lines are counted to the end."""
        return self._error is not None

    def check(self) -> None:
        if self._first is not None:
            _, line, problem = self._first
            source = self._sources[self._source]
            more = f"; {self.count - 1:,} more broken lines" if self.count > 2 else ""
            more = "; one more broken line" if self.count == 2 else more
            raise DataError(f"{source.key}: {source.name}, line {line}: {problem}{more}")
        if self._error is not None:
            _, index, message = self._error
            where = "" if message.startswith("zerotop") else f"{self._sources[index].name}, "
            raise DataError(f"{where}{message}")


def _run_alone(
    chunks: Iterator[Chunk], recipe: Recipe, folder: Path, problems: _Problems
) -> Generator[tuple[worker.Outcome, int], None, None]:
    encoder = Encoder(recipe)
    for number, chunk in enumerate(chunks):
        if problems.stop:
            return
        yield worker.encode_chunk(encoder, number, chunk, folder, problems.failed), chunk.weight


def _run(
    chunks: Iterator[Chunk], recipe: Recipe, folder: Path, problems: _Problems, count: int
) -> Generator[tuple[worker.Outcome, int], None, None]:
    """Encode chunks in `count` processes, each of which has one chunk at work and one waiting."""
    command = [sys.executable, "-P", "-m", "runtime.data.conversations.worker", str(folder)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done: queue.SimpleQueue[tuple[int, worker.Outcome | None]] = queue.SimpleQueue()
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) for _ in range(count)
    ]
    try:
        for index, process in enumerate(processes):
            threading.Thread(target=_listen, args=(index, process, done), daemon=True).start()
        weights: dict[int, int] = {}
        numbered = enumerate(chunks)
        waiting = [0] * count

        def give(index: int) -> None:
            if problems.stop:
                return
            for number, chunk in numbered:
                weights[number] = chunk.weight
                stdin = processes[index].stdin
                assert stdin is not None
                worker.send(stdin, (number, chunk, problems.failed))  # type: ignore[arg-type]
                waiting[index] += 1
                return

        try:
            for process in processes:
                assert process.stdin is not None
                worker.send(process.stdin, recipe)  # type: ignore[arg-type]
            for _ in range(2):
                for index in range(count):
                    give(index)
            while any(waiting):
                index, outcome = done.get()
                if outcome is None:
                    raise BrokenPipeError
                waiting[index] -= 1
                yield outcome, weights.pop(outcome.number)
                give(index)
        except BrokenPipeError:
            codes = [process.poll() for process in processes]
            raise DataError(
                f"a process that tokenizes ended (exit codes {[code for code in codes if code is not None]}); its "
                "message is above. If memory ran out, set zerotop.data.workers to a smaller number"
            ) from None
    finally:
        for process in processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in processes:
            if problems.stop or sys.exc_info()[0] is not None:
                process.kill()
            process.wait()


def _listen(index: int, process: subprocess.Popen[bytes], done: queue.SimpleQueue[Any]) -> None:
    """Put what a process answers in the queue, and None when it has ended."""
    assert process.stdout is not None
    try:
        with process.stdout, contextlib.suppress(EOFError):
            while True:
                done.put((index, worker.receive(process.stdout)))  # type: ignore[arg-type]
    finally:
        done.put((index, None))


def _summary(outcomes: Sequence[worker.Outcome], reader: Reader, recipe: Recipe) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    for outcome in outcomes:
        dropped.update(outcome.dropped)
    return {
        "store": store.FORMAT,
        "dtype": recipe.dtype.name,
        "vocab_size": recipe.vocab_size,
        "rows": sum(outcome.rows for outcome in outcomes),
        "samples": sum(outcome.samples for outcome in outcomes),
        "tokens": sum(outcome.tokens for outcome in outcomes),
        "dropped": dict(dropped),
        "files": [source.name for source in reader.sources],
        "entries": [source.entry for source in reader.sources],
        "forms": [reader.forms.get(index, "") for index in range(len(reader.sources))],
        "columns": [reader.columns.get(index, []) for index in range(len(reader.sources))],
    }


def _check_usable(
    meta: dict[str, Any], outcomes: Sequence[worker.Outcome], reader: Reader, recipe: Recipe, may_be_empty: bool
) -> None:
    """Raise DataError for masks that cannot be right, and if no sample is left."""
    key = reader.sources[0].key if reader.sources else "zerotop.data.files"
    dropped, rows = meta["dropped"], meta["rows"]
    wrong = next((outcome.wrong for outcome in outcomes if outcome.wrong), "")
    complaint = next((outcome.complaint for outcome in outcomes if outcome.complaint), "")
    bad = {name: dropped.get(name, 0) for name in (EMPTY_MASK, FULL_MASK, TURNS_NOT_FOUND)}
    if wrong and sum(bad.values()) > _WRONG_SHARE * rows:
        listed = " and ".join(f"{count:,} rows with {name}" for name, count in bad.items() if count)
        sources = "\n".join(recipe.templates.values())
        raise DataError(
            f"zerotop.data.train_on: the chat template does not show what the assistant writes: {listed}, of {rows:,}; "
            f"give another template in zerotop.data.chat_template, or train on everything (train_on: all)\n"
            f"--- the template\n{sources}\n--- one of the rows\n{wrong}"
        )
    if meta["samples"] or may_be_empty:
        return
    if rows == 0:
        raise DataError(f"{key}: no rows in {', '.join(meta['files'][:5]) or 'the data'}")
    reasons = ", ".join(f"{name}: {count:,}" for name, count in sorted(dropped.items(), key=lambda one: -one[1]))
    way_out = ""
    if complaint:
        way_out = f". The first: {complaint}"
    elif set(dropped) == {NO_TURN}:
        way_out = '; expected messages with the role "assistant"'
    raise DataError(f"{key}: all {rows:,} rows were left out ({reasons}){way_out}")


def _assemble(part: Path, pieces: Path, outcomes: Sequence[worker.Outcome], meta: dict[str, Any]) -> None:
    """Concatenate what the processes wrote, in the order of the rows."""
    kept = [outcome for outcome in outcomes if outcome.samples]
    for name in worker.ARRAYS:
        with (part / f"{name}.bin").open("wb") as out:
            for outcome in kept:
                piece = pieces / f"{outcome.number}.{name}"
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, out, 1 << 20)
                piece.unlink()
            out.flush()
            os.fsync(out.fileno())
    files = np.repeat(
        np.array([outcome.source for outcome in kept], np.int32),
        np.array([outcome.samples for outcome in kept], np.int64),
    )
    store.write_array(part / "files.bin", files)
    pieces.rmdir()
    with (part / "meta.json").open("w", encoding="utf-8") as out:
        json.dump(meta, out)
        out.flush()
        os.fsync(out.fileno())


class _Progress:
    """Logs progress about once a second, and nothing for builds that take less than a second."""

    def __init__(self, total_bytes: int, log: Log) -> None:
        self._total, self._log = total_bytes, log
        self._bytes = self._tokens = self._rows = 0
        self._start = self._said = time.monotonic()

    def add(self, seen_bytes: int, outcome: worker.Outcome) -> None:
        self._bytes += seen_bytes
        self._tokens += outcome.tokens
        self._rows += outcome.rows
        now = time.monotonic()
        if now - self._said < 1.0:
            return
        self._said = now
        rate = self._tokens / (now - self._start)
        if self._total and 0 < self._bytes < self._total:
            left = (self._total - self._bytes) * (now - self._start) / self._bytes
            self._log(
                f"tokenizing: {100 * self._bytes / self._total:.0f}% of {self._total / 2**20:,.1f} MiB, "
                f"{rate:,.0f} tokens/s, {left:.0f} s left"
            )
        else:
            self._log(f"tokenizing: {self._rows:,} rows, {rate:,.0f} tokens/s")

    def done(self, tokens: int, rows: int) -> None:
        seconds = time.monotonic() - self._start
        if seconds >= 1.0:
            self._log(f"tokenized {rows:,} rows into {tokens:,} tokens in {seconds:.1f} s")
