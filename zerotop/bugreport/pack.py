"""Packs the report into one .tar.gz or .zip file."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerotop.bugreport.contents import Part, run_files
from zerotop.bugreport.recording import CopiedRecording, copy_recording
from zerotop.bugreport.redact import Redactor
from zerotop.bugreport.system import environment, versions

MANIFEST = "manifest.json"
SUFFIXES = (".tar.gz", ".tgz", ".zip")


@dataclass(frozen=True)
class Packed:
    """A written report. `files` are (name, bytes, bytes of the original if only a part of it was taken)."""

    path: Path
    size: int
    files: Sequence[tuple[str, int, int]]
    removed: Mapping[str, int]
    notes: Sequence[str]


def default_name(run: str) -> str:
    """The file's name if the user gives none."""
    return f"zerotop-report-{run}-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz"


def pack(
    run: Path,
    target: Path,
    redactor: Redactor,
    *,
    status: Mapping[str, Any],
    status_text: str,
    doctor: Sequence[Mapping[str, Any]],
    pids: Mapping[int, int],
    notes: Iterable[str] = (),
) -> Packed:
    """Write the report on the run directory `run` to `target`, which does not exist; mode 0600.

    `status` and `status_text` are what `zerotop status` prints, `doctor` what `zerotop doctor` found, `pids` rank ->
    process id of the ranks that live, `notes` what the reader should know. Raises OSError, and leaves no file behind.
    """
    told = list(notes)
    with tempfile.TemporaryDirectory(prefix="zerotop-report-") as scratch:
        database = Path(scratch) / "recording.sqlite"
        copied = copy_recording(run / "recording.sqlite", database, redactor)
        own = _documents(status, doctor, pids, copied)
        parts = [Part("summary.txt", redactor.text(f"{status_text}\n").encode())]
        parts += [_redacted(Part(name, _dump(document)), redactor) for name, document in own.items()]
        parts += [_redacted(part, redactor) for part in run_files(run)]
        if database.exists() and copied.rows:
            parts.append(Part("recording.sqlite", database.read_bytes()))
    told += _notes(copied)
    told = [redactor.text(note) for note in told]
    manifest = _manifest(run.name, parts, redactor, told)
    parts.insert(0, Part(MANIFEST, _dump(manifest)))
    _write(target, f"zerotop-report-{run.name}", parts)
    files = [(part.name, len(part.content), part.of_bytes) for part in parts]
    return Packed(target, target.stat().st_size, files, dict(redactor.removed), told)


def _documents(
    status: Mapping[str, Any], doctor: Sequence[Mapping[str, Any]], pids: Mapping[int, int], copied: CopiedRecording
) -> dict[str, Any]:
    evaluation = status.get("evaluation")
    if evaluation:  # what the model wrote may repeat training data
        copied.samples += len(evaluation.get("generations") or [])
        status = {**status, "evaluation": {**evaluation, "generations": []}}
    return {
        "status.json": status,
        "versions.json": versions(),
        "environment.json": environment(pids),
        "doctor.json": list(doctor),
        "events.json": copied.events,
        "commands.json": copied.commands,
    }


def _redacted(part: Part, redactor: Redactor) -> Part:
    text = part.content.decode(errors="replace")
    cleaned = redactor.json_text(text) if part.is_json else redactor.text(text)
    return Part(redactor.text(part.name), cleaned.encode(errors="replace"), part.of_bytes)


def _notes(copied: CopiedRecording) -> list[str]:
    notes = [copied.problem] if copied.problem else []
    if copied.left_out:
        notes.append(
            f"of the recording the newest {copied.rows} messages are here, {copied.left_out} older ones are not"
        )
    if copied.samples:
        notes.append(f"{copied.samples} samples of training data and generated texts were left out")
    return notes


def _manifest(run: str, parts: Sequence[Part], redactor: Redactor, notes: Sequence[str]) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for part in parts:
        files[part.name] = {"bytes": len(part.content)} | ({"of_bytes": part.of_bytes} if part.of_bytes else {})
    return {
        "run": redactor.text(run),
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "files": files,
        "removed": dict(sorted(redactor.removed.items())),
        "removed_means": "how often, by kind; [removed] stands there now, ~ for the home directory, USER for the user",
        "notes": list(notes),
    }


def _dump(document: Any) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False, default=str) + "\n").encode(errors="replace")


def _write(target: Path, folder: str, parts: Sequence[Part]) -> None:
    """Write the archive under another name first, so that an interrupted one leaves nothing that looks whole."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            if target.name.endswith(".zip"):
                with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                    for part in parts:
                        archive.writestr(f"{folder}/{part.name}", part.content)
            else:
                with tarfile.open(fileobj=file, mode="w:gz", compresslevel=6) as archive_tar:
                    for part in parts:
                        archive_tar.addfile(
                            _member(f"{folder}/{part.name}", len(part.content)), io.BytesIO(part.content)
                        )
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _member(name: str, size: int) -> tarfile.TarInfo:
    """Without the names and numbers of the user, which tarfile would take from a file."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o600, int(time.time())
    return member
