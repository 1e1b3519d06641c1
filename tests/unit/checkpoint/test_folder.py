"""A folder of checkpoints: one is complete or not there, `latest` is never wrong, and what stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.checkpoint.format import folder as folders
from runtime.checkpoint.format.manifest import (
    MANIFEST,
    CheckpointError,
    DamagedCheckpoint,
    Manifest,
    read_manifest,
    record_of,
    verify,
)
from runtime.checkpoint.format.retention import prune
from runtime.wire.sizes import format_size


def manifest(step: int, number: int, **more) -> Manifest:
    return Manifest(
        step=step, optimizer_step=step, world_size=1, stage=0, precision="fp32", optimizer="AdamW", groups=1,
        config_digest="", shapes={}, frozen=[], number=number, **more,
    )  # fmt: skip


def put(folder: Path, step: int, text: str = "data", tag: str = "") -> Path:
    """A checkpoint as the writers complete it."""
    tag = tag or folders.step_tag(step)
    try:
        partial = folders.claim_partial(folder, tag)
        (partial / "data").write_text(text)
        files = {"data": record_of(partial / "data")}
        (partial / MANIFEST).write_bytes(manifest(step, folders.next_number(folder), files=files).sealed())
        folders.finish(folder, tag)
    finally:
        folders.release_partial(folders.partial_of(folder, tag))
    return folder / tag


def test_the_newest_is_what_was_completed_last_and_latest_says_so(tmp_path):
    put(tmp_path, 200)
    older = put(tmp_path, 100)  # somebody went back and trained another way
    assert folders.newest(tmp_path) == older
    assert (tmp_path / "latest").read_text() == "step-00000100\n"
    assert [found.step for found in folders.complete_checkpoints(tmp_path)] == [200, 100]
    assert [path.name for path in prune(tmp_path, 1)] == ["step-00000200"]


def test_every_nth_stays_for_ever(tmp_path):
    for step in range(1, 10):
        put(tmp_path, step)
        prune(tmp_path, 2, keep_every=4)
    assert [found.step for found in folders.complete_checkpoints(tmp_path)] == [4, 8, 9]
    assert not list(tmp_path.glob(".*"))


def test_pruning_leaves_other_names_alone(tmp_path):
    put(tmp_path, 1, tag="mine")
    for step in (2, 3):
        put(tmp_path, step)
    prune(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["latest", "mine", "step-00000003"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_one_of_the_same_name_is_replaced(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    put(tmp_path, 5, "old")
    path = put(tmp_path, 5, "new")
    assert (path / "data").read_text() == "new" and read_manifest(path).number == 2
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("stop_at", range(12))
def test_killed_anywhere_while_it_is_replaced_one_remains(tmp_path, monkeypatch, stop_at, exchanges):
    """Every call that changes the disk may be the last one."""
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    put(tmp_path, 4, "old")
    calls = 0

    class Killed(BaseException):
        pass

    def counted(real):
        def call(*given, **more):
            nonlocal calls
            calls += 1
            if calls > stop_at:
                raise Killed
            return real(*given, **more)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", counted(Path.rename))
        patched.setattr(os, "replace", counted(os.replace))
        patched.setattr(os, "fsync", counted(os.fsync))
        patched.setattr(folders.shutil, "rmtree", counted(folders.shutil.rmtree))
        if exchanges:
            patched.setattr(folders, "_exchange", counted(folders._exchange))
        try:
            put(tmp_path, 4, "new")
            killed = False
        except Killed:
            killed = True
    assert killed == (calls > stop_at)
    folders.claim_partial(tmp_path, "next").rmdir()  # what the next save does first
    (found,) = folders.complete_checkpoints(tmp_path)
    assert (found.path / "data").read_text() in ("old", "new")
    assert (tmp_path / "latest").read_text().strip() == found.path.name
    verify(found.path, read_manifest(found.path))


def test_a_manifest_that_was_changed_is_damaged(tmp_path):
    path = put(tmp_path, 7)
    content = (path / MANIFEST).read_bytes()
    for at in range(0, len(content), 7):
        changed = bytearray(content)
        changed[at] ^= 1
        (path / MANIFEST).write_bytes(changed)
        if json_equal(content, bytes(changed)):
            continue  # white space
        with pytest.raises(CheckpointError):
            read_manifest(path)
    (path / MANIFEST).write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedCheckpoint, match="is damaged"):
        read_manifest(path)
    assert folders.newest(tmp_path) is None


def json_equal(first: bytes, second: bytes) -> bool:
    try:
        return json.loads(first) == json.loads(second)
    except ValueError:
        return False


def test_what_is_no_checkpoint_says_what_there_is(tmp_path):
    with pytest.raises(CheckpointError, match=r"step-9 does not exist$"):
        read_manifest(tmp_path / "step-9")
    path = put(tmp_path, 7)
    with pytest.raises(CheckpointError, match=rf"step-9 does not exist; the newest checkpoints in .* are {path.name}$"):
        read_manifest(tmp_path / "step-9")
    (tmp_path / "step-9").mkdir()
    with pytest.raises(CheckpointError, match=r"step-9 is not a complete checkpoint: it has no manifest.json"):
        read_manifest(tmp_path / "step-9")


def test_manifests_of_early_versions_are_read(tmp_path):
    path = tmp_path / "step-00000003"
    path.mkdir()
    body = manifest(3, 0).model_dump(mode="json", exclude={"files", "number", "saved_wall_s"})
    (path / MANIFEST).write_text(json.dumps(body))
    assert read_manifest(path).step == 3 and folders.newest(tmp_path) == path
    assert folders.next_number(tmp_path) == 1


def test_ranks_share_the_verifying(tmp_path):
    path = put(tmp_path, 1)
    written = read_manifest(path)
    (path / "data").write_text("DATA")
    wrong = []
    for part in range(3):
        try:
            verify(path, written, part, 3)
        except DamagedCheckpoint as error:
            wrong.append(str(error))
    assert len(wrong) == 1 and "data was changed" in wrong[0]


def test_what_a_killed_writer_left_is_swept(tmp_path):
    put(tmp_path, 1)
    left = folders.claim_partial(tmp_path, "step-00000002")
    (left / "data").write_text("half")
    folders.release_partial(left)  # as its end does
    (tmp_path / ".mine").mkdir()
    folders.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "latest", "step-00000001"]


def test_what_another_process_writes_stays(tmp_path):
    program = "import sys; from pathlib import Path; from runtime.checkpoint.format.folder import claim_partial; "
    program += "print(claim_partial(Path(sys.argv[1]), 'step-00000007'), flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline().strip().endswith(".step-00000007.partial")
        put(tmp_path, 8)
        assert (tmp_path / ".step-00000007.partial").is_dir()
        with pytest.raises(CheckpointError, match="another process is writing it"):
            put(tmp_path, 7)
        other.kill()
    put(tmp_path, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000007", "step-00000008"]


def test_the_space_a_checkpoint_needs(tmp_path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert folders.disk_space_problem(tmp_path / "not" / "yet", 1 << 10) == ""
    problem = folders.disk_space_problem(tmp_path, 2 * free)
    assert f"needs {format_size(2 * free)}" in problem and "free" in problem
