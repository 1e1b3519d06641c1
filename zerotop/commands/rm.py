"""zerotop rm: delete runs that are over, after saying what that deletes."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerotop.rundir.directory import RunEntry


def register(subparsers: Any) -> None:
    """Add `rm` to the command line."""
    parser = subparsers.add_parser(
        "rm",
        help="delete runs that are over",
        description="Delete runs that are over: their recordings, logs and checkpoints. First it says what would be "
        "deleted, and asks. Checkpoints outside of the run directory are only deleted with --checkpoints.",
        epilog="examples:\n  zerotop rm q1 --dry-run     what it would delete\n  zerotop rm q1 q2 --yes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")
    parser.add_argument(
        "--checkpoints", action="store_true", help="also the checkpoints in zerotop.checkpoint.folder of their configs"
    )
    parser.add_argument("--json", action="store_true", help="print what was (or would be) deleted")


def run(arguments: argparse.Namespace) -> int:
    """Say, ask, delete."""
    from zerotop.output import CommandError, print_json, say, show
    from zerotop.rundir.directory import find_run

    entries = [find_run(name) for name in dict.fromkeys(arguments.runs)]
    for entry in entries:
        if entry.live:
            raise CommandError(
                f"run {entry.name} is {entry.status.state}, nothing was deleted: zerotop stop {entry.name} ends it"
            )
    documents = [_document(entry, arguments.checkpoints) for entry in entries]
    if not arguments.json:
        show("\n".join(_text(document) for document in documents))
    if not arguments.dry_run:
        if not arguments.yes:
            _ask(len(entries))
        for entry, document in zip(entries, documents, strict=True):
            _delete(entry, [Path(part["path"]) for part in document["deleted"]])
            if not arguments.json:
                say(f"{entry.name} is deleted")
    if arguments.json:
        print_json({"dry_run": arguments.dry_run, "runs": documents})
    return 0


def _document(entry: RunEntry, checkpoints: bool) -> dict[str, Any]:
    """{"name", "state", "bytes", "deleted": [{"path", "what", "bytes"}], "kept": [...]}."""
    from runtime.checkpoint.format.folder import complete_checkpoints
    from zerotop.rundir.checkpoints import checkpoints_of

    folder = checkpoints_of(entry)
    inside = folder.is_relative_to(entry.path)
    steps = [one.step for one in complete_checkpoints(folder)]
    saved = f"{len(steps)} checkpoint{'s' * (len(steps) != 1)}"
    saved += f" (steps {', '.join(map(str, steps[-4:]))})" if steps else ""
    deleted: list[dict[str, Any]] = [
        {"path": str(entry.path), "what": "the run directory", "bytes": freed_bytes(entry.path)}
    ]
    if inside:
        deleted[0]["what"] = f"the run directory with {saved}"
    kept: list[dict[str, Any]] = []
    if not inside and folder.exists():
        part = {"path": str(folder), "what": saved, "bytes": freed_bytes(folder)}
        (deleted if checkpoints else kept).append(part)
    return {
        "name": entry.name,
        "state": entry.status.state,
        "step": entry.status.step,
        "bytes": sum(part["bytes"] for part in deleted),
        "deleted": deleted,
        "kept": kept,
    }


def freed_bytes(folder: Path) -> int:
    """What deleting the folder frees: files that another run shares (hard links of a branch) free nothing."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(base, name))
            except FileNotFoundError:
                continue
            total += found.st_blocks * 512 if found.st_nlink == 1 else 0
    return total


def _text(document: dict[str, Any]) -> str:
    from zerotop.format import bytes_text

    lines = [f"{document['name']} ({document['state']} at step {document['step']}): {bytes_text(document['bytes'])}"]
    lines += [f"  delete  {part['path']}: {part['what']}" for part in document["deleted"]]
    lines += [f"  keep    {part['path']}: {part['what']} (--checkpoints deletes them)" for part in document["kept"]]
    return "\n".join(lines)


def _ask(count: int) -> None:
    from zerotop.output import CommandError, say

    if not sys.stdin.isatty():
        raise CommandError("rm can't be undone, and there is no terminal to ask on: zerotop rm RUN --yes")
    print(
        f"delete {'it' if count == 1 else f'these {count} runs'} for good? [y/N] ", end="", file=sys.stderr, flush=True
    )
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        say("nothing was deleted")
        raise CommandError("not confirmed", exit_code=1)


def _delete(entry: RunEntry, folders: list[Path]) -> None:
    """Under the run's lock, so that no launch --resume begins meanwhile."""
    from zerotop.output import CommandError
    from zerotop.rundir.lock import take
    from zerotop.rundir.paths import error_text

    lock = take(entry.path)
    if lock is None:
        raise CommandError(f"{entry.name} is in use by another process; nothing of it was deleted", exit_code=1)
    try:
        for folder in reversed(folders):  # the run directory last: while it is there, rm can be repeated
            shutil.rmtree(folder)
    except OSError as error:
        raise CommandError(f"{entry.name} is not deleted completely: {error_text(error)}", exit_code=1) from None
    finally:
        os.close(lock)
