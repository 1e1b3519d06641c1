"""python -P -m runtime.export.__main__: the process that `zerotop export` starts, because it needs torch.

Progress goes to stderr, one JSON document to stdout: what was written, or {"error": ...}. Exit codes: 0 success; 1
write error; 2 unusable checkpoint, folder or argument; 130 ended by a signal or by the end of its parent.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from runtime.checkpoint.format.manifest import CheckpointError, FileRecord, read_manifest, verify
from runtime.export.target import atomic_folder, check_space, check_target
from runtime.process.parent import die_with_parent
from runtime.wire.sizes import format_size

# torch is imported after the signal handlers are installed: it takes seconds, and a signal must not give a traceback.

_M_MMAP_THRESHOLD = -3
_OWN_MAPPING_BYTES = 1 << 20
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Export and print the result; returns the exit code."""
    for number in _ENDS:
        signal.signal(number, _end)
    try:
        die_with_parent(signal.SIGTERM)
        _give_memory_back()
        document = export(_parser().parse_args(argv))
    except KeyboardInterrupt:
        return 130
    except CheckpointError as error:
        return _answer({"error": str(error)}, 2)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _answer({"error": f"{error.strerror or error}{where}"}, 1)
    return _answer(document, 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runtime.export.__main__")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    parser.add_argument("--shard-bytes", type=int, required=True)
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--overwrite", action="store_true")
    return parser


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check everything -> write under a hidden name -> rename. Returns a summary of what was written.

    Raises CheckpointError for an unusable checkpoint or folder, OSError if it cannot be written."""
    out = check_target(arguments.out, arguments.checkpoint, arguments.overwrite)
    verify(arguments.checkpoint, read_manifest(arguments.checkpoint), on_file=_report_large_file)
    from runtime.export.huggingface import HuggingFaceExport

    planned = HuggingFaceExport(
        arguments.checkpoint, arguments.dtype, arguments.shard_bytes, arguments.merge, arguments.base
    )
    check_space(out, planned.needed_bytes)
    with atomic_folder(out) as folder:
        document = planned.write(folder, lambda line: print(line, file=sys.stderr, flush=True))
        check_target(out, arguments.checkpoint, arguments.overwrite)  # it may have changed meanwhile
    return {"out": str(out)} | document


def _report_large_file(name: str, record: FileRecord) -> None:
    """Report a file that takes a second or more to read."""
    if record.nbytes > 1 << 30:
        print(f"checking {name}, {format_size(record.nbytes)}", file=sys.stderr, flush=True)


def _give_memory_back() -> None:
    """Make malloc use mappings of their own for tensors, which are returned to the system when freed; glibc's heap
    would keep up to 240 MiB in addition to a shard of 256 MiB (measured)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # mallopt(3); other C libraries need none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)


def _end(_number: int, _frame: FrameType | None) -> None:
    for number in _ENDS:  # cleaning up must not be interrupted
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _answer(document: dict[str, Any], exit_code: int) -> int:
    print(json.dumps(document), flush=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
