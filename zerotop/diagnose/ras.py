"""NCCL's own view of its communicators: the RAS service that every NCCL process offers since NCCL 2.24, and the files
of NCCL Inspector. Read with a time limit and kept as evidence beside others, never alone: RAS has called a hanging job
healthy (NVIDIA/nccl issue 1730).
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_ADDRESS = "localhost:28028"
ADDRESS_VARIABLE, ENABLE_VARIABLE = "NCCL_RAS_ADDR", "NCCL_RAS_ENABLE"
QUERY_S = 4.0
"""Time limit of one query, connecting included."""
ANSWER_BYTES = 4 * 2**20
INSPECTOR_VARIABLE = "NCCL_INSPECTOR_DUMP_DIR"
INSPECTOR_FILES, INSPECTOR_BYTES = 8, 64 * 1024
_PROTOCOL = 2
_NO_COMMA = re.compile(r'("nvml_dev": *-?\d+)(\s*"status")')
"""NCCL 2.28 leaves out this comma in the list of missing ranks."""


@dataclass(frozen=True)
class RasAnswer:
    """What the service answered. `document` is None for a text answer (NCCL before 2.28) and when there is none;
    `trouble` says why, in a sentence."""

    text: str = ""
    document: Mapping[str, Any] | None = None
    trouble: str = ""


def ras_address(variables: Mapping[str, str]) -> tuple[str, int] | None:
    """Host and port of the service of processes with this environment; None if RAS is switched off or the address can't
    be read."""
    if variables.get(ENABLE_VARIABLE) == "0":
        return None
    host, _, port = (variables.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS).rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "localhost"
    return (host, int(port)) if port.isdecimal() and int(port) < 2**16 else None


def query(address: tuple[str, int], timeout_s: float = QUERY_S) -> RasAnswer:
    """Ask for the verbose status, as JSON where NCCL can. Blocks, for at most `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    try:
        answer = _ask(address, deadline, as_json=True)
        if answer is None:
            text = _ask(address, deadline, as_json=False) or ""
            return RasAnswer(text)
    except TimeoutError:
        return RasAnswer(trouble=f"NCCL RAS did not answer within {timeout_s:g} s at {address[0]}:{address[1]}")
    except ConnectionRefusedError:
        return RasAnswer(trouble=f"no NCCL process offers RAS at {address[0]}:{address[1]}")
    except (OSError, ValueError) as error:
        return RasAnswer(trouble=f"NCCL RAS can't be read at {address[0]}:{address[1]}: {error}")
    try:
        document = json.loads(_NO_COMMA.sub(r"\1,\2", answer))
        return RasAnswer(answer, document if isinstance(document, dict) else None)
    except ValueError:
        return RasAnswer(answer)


def _ask(address: tuple[str, int], deadline: float, *, as_json: bool) -> str | None:
    """The answer up to the end of the connection; None if JSON was asked for and is not known there."""
    with socket.create_connection(address, timeout=_left(deadline)) as connection:
        hello = _exchange(connection, f"CLIENT PROTOCOL {_PROTOCOL}", deadline)
        if not hello.upper().startswith("SERVER PROTOCOL"):
            raise ValueError(f"it answered {hello[:60]!r}, which is not NCCL RAS")
        _exchange(connection, f"TIMEOUT {max(1, int(_left(deadline)) - 1)}", deadline)
        if as_json and _exchange(connection, "SET FORMAT json", deadline).upper() != "OK":
            return None
        connection.sendall(b"VERBOSE STATUS\n")
        return _read(connection, deadline, to_newline=False).decode(errors="replace")


def _exchange(connection: socket.socket, line: str, deadline: float) -> str:
    connection.settimeout(_left(deadline))
    connection.sendall(f"{line}\n".encode())
    return _read(connection, deadline, to_newline=True).decode(errors="replace").strip()


def _read(connection: socket.socket, deadline: float, *, to_newline: bool) -> bytes:
    """Bytes until a newline at their end, or until the connection ends. Raises TimeoutError at the deadline."""
    got = bytearray()
    while len(got) < ANSWER_BYTES and not (to_newline and got.endswith(b"\n")):
        connection.settimeout(_left(deadline))
        block = connection.recv(65536)
        if not block:
            break
        got += block
    return bytes(got)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def summary(answer: RasAnswer) -> str:
    """One line: ranks that NCCL misses, errors, and ranks that have issued fewer operations than others."""
    if answer.trouble:
        return answer.trouble
    if answer.document is None:
        return "NCCL RAS answered in text, see ras.txt" if answer.text else "NCCL RAS answered nothing"
    told: list[str] = []
    communicators = [c for c in answer.document.get("communicators") or [] if isinstance(c, dict)]
    for number, communicator in enumerate(communicators):
        called = f"communicator {number}" if len(communicators) > 1 else "its communicator"
        told += [f"{_rank(rank)} of {called} {_missing(rank)}" for rank in communicator.get("missing_ranks") or []]
        ranks = communicator.get("ranks") or []
        told += [f"{_rank(rank)} of {called} has an error" for rank in ranks if _has_error(rank)]
        told += _behind(called, ranks)
    if not told:
        return "NCCL RAS reports no problem, which does not prove that there is none"
    return f"NCCL RAS: {'; '.join(told[:4])}" + (f"; and {len(told) - 4} more" if len(told) > 4 else "")


def _rank(rank: Mapping[str, Any]) -> str:
    return f"rank {rank.get('rank')} (pid {rank.get('pid')})"


def _missing(rank: Mapping[str, Any]) -> str:
    status = rank.get("status") or {}
    return "is considered dead" if status.get("considered_dead") else "does not respond"


def _has_error(rank: Mapping[str, Any]) -> bool:
    status = rank.get("status") or {}
    return bool(status.get("async_error") or status.get("abort_flag"))


def _behind(called: str, ranks: list[Mapping[str, Any]]) -> list[str]:
    """Per operation, the ranks whose count is lowest."""
    told = []
    operations = sorted({op for rank in ranks for op in rank.get("collective_counts") or {}})
    for op in operations:
        counts = {_rank(rank): int((rank.get("collective_counts") or {}).get(op, 0)) for rank in ranks}
        low, high = min(counts.values()), max(counts.values())
        late = [name for name, count in counts.items() if count == low]
        if low < high and len(late) <= 4:
            told.append(f"{', '.join(late)} of {called} issued {low} {op}, others up to {high}")
    return told


def inspector_files(variables: Mapping[str, str]) -> list[tuple[str, bytes]]:
    """(name, last bytes) of the newest files of NCCL Inspector, where the environment switches it on."""
    folder = variables.get(INSPECTOR_VARIABLE, "")
    if not folder or variables.get("NCCL_INSPECTOR_ENABLE", "") in ("", "0"):
        return []
    found: list[tuple[str, bytes]] = []
    try:
        paths = [path for path in Path(folder).iterdir() if path.is_file() and not path.is_symlink()]
        for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)[:INSPECTOR_FILES]:
            with path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - INSPECTOR_BYTES))
                found.append((path.name, file.read(INSPECTOR_BYTES)))
    except OSError:
        return found  # a file that goes away meanwhile
    return found
