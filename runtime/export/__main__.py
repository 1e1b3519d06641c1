"""python -P -m runtime.export.__main__: the process that `zerotop export` starts, because it needs torch.

Progress goes to stderr, one JSON document to stdout: what was written, or {"error": ...}. Exit codes: 0 done; 1 it
can't be written; 2 a checkpoint, folder or value that is no good; 130 ended by a signal, or by its parent's end.
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
from runtime.export.target import appearing, check_space, check_target
from runtime.telemetry.orphan import die_with_parent
from runtime.wire.sizes import format_size

# torch is imported when the signals are in place: it takes seconds, and whoever ends us meanwhile wants no traceback.

_M_MMAP_THRESHOLD = -3
_OWN_MAPPING_BYTES = 1 << 20
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
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
    parser.add_argument("--overwrite", action="store_true")
    return parser


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Look at everything -> write under a hidden name -> rename. Returns what was written.

    Raises CheckpointError for a checkpoint or folder that is no good, OSError when it can't be written."""
    out = check_target(arguments.out, arguments.checkpoint, arguments.overwrite)
    verify(arguments.checkpoint, read_manifest(arguments.checkpoint), on_file=_report_large_file)
    from runtime.export.huggingface import HuggingFaceExport

    planned = HuggingFaceExport(arguments.checkpoint, arguments.dtype, arguments.shard_bytes)
    check_space(out, planned.needed_bytes)
    with appearing(out) as folder:
        document = planned.write(folder, lambda line: print(line, file=sys.stderr, flush=True))
        check_target(out, arguments.checkpoint, arguments.overwrite)  # what came there meanwhile is not ours
    return {"out": str(out)} | document


def _report_large_file(name: str, record: FileRecord) -> None:
    """Reading it takes about a second or more."""
    if record.nbytes > 1 << 30:
        print(f"checking {name}, {format_size(record.nbytes)}", file=sys.stderr, flush=True)


def _give_memory_back() -> None:
    """glibc's heap keeps what was freed between blocks that weren't, and puts ever larger tensors there: 240 MiB more
    than a shard of 256, measured. In mappings of their own they are gone when they are freed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # mallopt(3); other C libraries need none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)


def _end(_number: int, _frame: FrameType | None) -> None:
    for number in _ENDS:  # clearing up is not to be interrupted
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _answer(document: dict[str, Any], exit_code: int) -> int:
    print(json.dumps(document), flush=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
