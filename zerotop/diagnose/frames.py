"""Stack frames as text: read from faulthandler's dumps, named in a few words, and grouped over the ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from zerotop.state.stall import ranks_text

Key = TypeVar("Key")
_THREAD = re.compile(r"^(Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):$")
_PYTHON = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$')
_NATIVE = re.compile(r"^\s*C (?P<function>.+) \((?P<library>[^()]*)\)$")
_PLUMBING = re.compile(r"/(?:lib/python3\.\d+|torch|runtime/comm|runtime/native)/")
"""Files of frames that carry out a call. Where the call was made says more: torch, the standard library, and our own
communication layer."""
_WRAPPERS = frozenset(
    {"wrapper", "inner", "_fn", "_wrapped", "__call__", "_call_impl", "_wrapped_call_impl", "decorate_context"}
)
_INTERPRETER = re.compile(r"0x[0-9a-f]+$|_?Py[A-Z_]|ffi_|_call_function_pointer|_ctypes|thread_run$")
_SITE = re.compile(r"/(?:site|dist)-packages/")


@dataclass(frozen=True)
class ThreadStack:
    """One thread. `frames` are lines in faulthandler's form, innermost call first; C frames: `  C name (library)`."""

    main: bool
    frames: tuple[str, ...]


def parse(text: str) -> tuple[ThreadStack, ...]:
    """The threads of one faulthandler dump, the training thread first: it is the one that got the signal."""
    threads: list[tuple[bool, list[str]]] = []
    for line in text.splitlines():
        head = _THREAD.match(line)
        if head:
            threads.append((head[1] == "Current thread", []))
        elif threads and line.strip():
            threads[-1][1].append(line)
    if threads and not any(main for main, _ in threads):
        threads[-1] = (True, threads[-1][1])  # the oldest comes last
    stacks = [ThreadStack(main, tuple(frames)) for main, frames in threads]
    return tuple(sorted(stacks, key=lambda stack: not stack.main))


def python_frame(file: str, line: int, function: str) -> str:
    """A Python frame as faulthandler writes it."""
    return f'  File "{file}", line {line} in {function}'


def native_frame(function: str, library: str) -> str:
    """A C frame as a line."""
    return f"  C {function} ({library})"


def place(frames: Iterable[str]) -> str:
    """Where a thread is, in a few words: `all_gather at unshard.py:210`, the call and the line that makes it.

    The line is the innermost one outside torch, the standard library and the communication layer; the call is the
    function that it calls, as far as the frames tell. Empty without a Python frame.
    """
    inside: list[str] = []
    innermost = ""
    for line in frames:
        native, python = _NATIVE.match(line), _PYTHON.match(line)
        if native and not _INTERPRETER.match(native["function"]):
            inside.append(native["function"].partition("(")[0])
        if python is None:
            continue
        file, function = python["file"], python["function"]
        where = f"{file.rpartition('/')[2]}:{python['line']}"
        innermost = innermost or f"{function} at {where}"
        if not _PLUMBING.search("/" + _SITE.split(file)[-1]) and not file.startswith("<"):
            return f"{inside[-1] if inside else function} at {where}"
        if function not in _WRAPPERS:
            inside.append(function)
    return innermost


def grouped(pairs: Iterable[tuple[Key, int]]) -> dict[Key, tuple[int, ...]]:
    """Key -> the ranks that have it, in order, each once."""
    groups: dict[Key, list[int]] = {}
    for key, rank in pairs:
        ranks = groups.setdefault(key, [])
        if rank not in ranks:
            ranks.append(rank)
    return {key: tuple(ranks) for key, ranks in groups.items()}


def summary(places: Mapping[int, str]) -> str:
    """Where the ranks are, the common place first and then the outliers: `7 ranks: all_gather at unshard.py:210; rank 3
    alone: sleep at data.py:17`. `places` is rank -> place."""
    groups = sorted(grouped((where, rank) for rank, where in sorted(places.items())).items(), key=lambda g: -len(g[1]))
    if not groups:
        return ""
    (common, most), total = groups[0], len(places)
    if len(groups) == 1:
        return f"{f'all {total} ranks' if total > 1 else ranks_text(most)}: {common}"
    if len(most) * 2 <= total:  # no majority: nobody is an outlier
        return "; ".join(f"{ranks_text(who)}: {where}" for where, who in groups)
    others = [f"{ranks_text(who)}{' alone' if len(who) == 1 else ''}: {where}" for where, who in groups[1:]]
    return "; ".join([f"{len(most)} ranks: {common}", *others])


def spokesmen(keys: Mapping[int, object], limit: int) -> tuple[int, ...]:
    """At most `limit` ranks, one of each group of equal keys, the smallest groups first: outliers tell most."""
    groups = grouped((key, rank) for rank, key in sorted(keys.items()))
    return tuple(ranks[0] for ranks in sorted(groups.values(), key=len)[:limit])
