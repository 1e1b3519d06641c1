"""A checkpoint from somebody else: nothing in it is run, nothing outside it is read, and every lie is one clear error
before memory is taken for it. Its manifest fits, for whoever changes the files can make that, too."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.checkpoint.content.capture import bytes_of
from runtime.checkpoint.content.small_files import read_common, read_random
from runtime.checkpoint.format.manifest import CheckpointError, Manifest, read_manifest, record_of, verify
from runtime.checkpoint.format.plain import to_bytes
from runtime.checkpoint.format.reader import CheckpointReader
from runtime.checkpoint.format.slices import Part
from runtime.checkpoint.saving.commit import write
from runtime.checkpoint.saving.job import Job

WEIGHT, BUFFER = torch.arange(6.0), torch.tensor([True, False])


class Alone:
    rank, world_size = 0, 1

    def broadcast_object(self, value: Any) -> Any:
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    manifest = Manifest(
        step=1, optimizer_step=1, world_size=1, stage=0, precision="fp32", optimizer="AdamW", groups=1,
        config_digest="x", shapes={"w": [2, 3]}, buffers={"mask": [2]}, frozen=[],
    )  # fmt: skip
    parts = [
        Part("param.w", 0, 4, 6, "float32"), Part("param.w", 4, 2, 6, "float32"),
        Part("buffer.mask", 0, 2, 2, "bool"),
    ]  # fmt: skip
    tensors = [WEIGHT[:4], WEIGHT[4:], BUFFER]
    common = {"scalars": {}, "lr": [0.1], "initial_lrs": [0.1], "scheduler": None, "loss_scale": {}}
    files = {"common.pt": to_bytes({**common, "registered": {}, "client_state": {"epoch": 3}})}
    write(Job(tmp_path, "c", parts, files, manifest), lambda index: bytes_of(tensors[index]), Alone())
    return tmp_path / "c"


def reseal(path: Path) -> None:
    """As if it had been written so."""
    manifest = read_manifest(path)
    names = [file.name for file in path.iterdir() if file.is_file() and file.name != "manifest.json"]
    files = {name: record_of(path / name) for name in names}
    (path / "manifest.json").write_bytes(manifest.model_copy(update={"files": files}).sealed())


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """As an export does, and what a resume reads beside."""
    verify(path, read_manifest(path))
    reader = CheckpointReader(path)
    read_common(path)
    if (path / "rng-0.pt").exists():
        read_random(path, 0)
    return {stored.name: reader.read(stored, stored.dtype) for stored in reader.tensors}


def assert_right(found: dict[str, torch.Tensor]) -> None:
    assert torch.equal(found["w"], WEIGHT.view(2, 3)) and torch.equal(found["mask"], BUFFER)


class Evil:
    """Leaves a mark when it is unpickled, and looks like what was asked for."""

    def __init__(self, mark: Path, content: bytes = b"") -> None:
        self.mark, self.content = mark, content

    def __reduce__(self) -> Any:
        code = f"(open({str(self.mark)!r}, 'w').close(), __import__('pickle').loads({self.content!r}))[1]"
        return eval, (code,)


@pytest.mark.parametrize(
    "name", [".metadata", "tensors.json", "common.pt", "rng-0.pt", "__0_0.distcp", "manifest.json"]
)
@pytest.mark.parametrize("legacy", [False, True])
def test_no_file_of_it_runs_code(checkpoint, tmp_path, name, legacy):
    mark = tmp_path / "mark"
    whole = (checkpoint / name).read_bytes() if name == ".metadata" else pickle.dumps(None)
    evil = pickle.dumps(Evil(mark, whole))
    pickle.loads(evil)
    assert mark.exists()  # it would
    mark.unlink()
    if legacy:
        (checkpoint / "tensors.json").unlink()
    (checkpoint / name).write_bytes(evil)
    if name != "manifest.json":
        reseal(checkpoint)
    if name == ".metadata" and not legacy:
        assert_right(read_all(checkpoint))
    else:
        with pytest.raises(CheckpointError) as error:
            read_all(checkpoint)
        assert name in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not mark.exists()


def test_torchs_own_format_with_code_in_it_is_refused(checkpoint, tmp_path):
    mark = tmp_path / "mark"
    for name in ("common.pt", "__0_0.distcp"):
        before = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(to_bytes(Evil(mark, pickle.dumps({}))).ljust(len(before), b"\0"))
        reseal(checkpoint)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            read_all(checkpoint)
        (checkpoint / name).write_bytes(before)
    assert not mark.exists()


def test_checkpoints_of_earlier_versions_are_read(checkpoint):
    (checkpoint / "tensors.json").unlink()
    reseal(checkpoint)
    assert_right(read_all(checkpoint))


def a_part(**changes: Any) -> Any:
    """Another first part of param.w."""

    def change(tensors: dict[str, Any]) -> None:
        part = dict(zip(("start", "numel", "file", "offset", "nbytes"), tensors["param.w"]["parts"][0], strict=True))
        tensors["param.w"]["parts"][0] = list((part | changes).values())

    return change


def a_tensor(name: str, **changes: Any) -> Any:
    return lambda tensors: tensors[name].update(changes)


LIES = {
    "a file elsewhere": (a_part(file="../c/__0_0.distcp"), "not one of its data files"),
    "a file of another kind": (a_part(file="common.pt"), "not one of its data files"),
    "a place beyond the end": (a_part(offset=10**9), "expected 1,000,"),
    "a place that another has": (a_part(offset=1500), "overlaps another tensor"),
    "more elements than bytes": (a_part(numel=10**15), "too few"),
    "a negative size": (a_part(numel=-4), "greater than or equal to 0"),
    "no number": (a_part(offset="0"), "valid integer"),
    "a gap": (a_part(start=1), "the parts of param.w have gaps or overlap"),
    "a huge tensor": (a_tensor("param.w", numel=10**15), "the parts of param.w have gaps or overlap"),
    "no such dtype": (a_tensor("param.w", dtype="system"), "dtype 'system'"),
    "another dtype": (a_tensor("param.w", dtype="int32"), "expected 4 elements of int32"),
    "another shape": (lambda tensors: tensors.update({"param.w": tensors["buffer.mask"]}), "overlaps another tensor"),
    "a parameter less": (lambda tensors: tensors.pop("param.w"), "lacks param.w"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_description_that_is_not_true_is_one_error(checkpoint, lie):
    change, message = LIES[lie]
    index = json.loads((checkpoint / "tensors.json").read_bytes())
    change(index["tensors"])
    (checkpoint / "tensors.json").write_text(json.dumps(index))
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        read_all(checkpoint)


@pytest.mark.parametrize("name", ["manifest.json", "tensors.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe"])
def test_what_is_no_description_is_one_error(checkpoint, name, content):
    (checkpoint / name).write_bytes(content)
    if name != "manifest.json":
        reseal(checkpoint)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read_all(checkpoint)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "model/../../outside", "..", "a/b", "", "a\nb"])
def test_a_manifest_names_only_files_of_its_own(checkpoint, name):
    manifest = read_manifest(checkpoint)
    files = {**manifest.files, name: record_of(checkpoint / "common.pt")}
    (checkpoint / "manifest.json").write_bytes(manifest.model_copy(update={"files": files}).sealed())
    with pytest.raises(CheckpointError, match="is not the name of a file in a checkpoint"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("name", ["manifest.json", "tensors.json", "common.pt", "__0_0.distcp"])
def test_a_pipe_is_not_waited_for(checkpoint, name):
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_all(checkpoint)


def test_packed_content_is_not_unpacked(checkpoint):
    """A few kilobytes may be gigabytes."""
    content, packed = io.BytesIO((checkpoint / "common.pt").read_bytes()), io.BytesIO()
    with zipfile.ZipFile(content) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in plain.infolist():
            archive.writestr(entry.filename, plain.read(entry))
    (checkpoint / "common.pt").write_bytes(packed.getvalue())
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match="compressed"):
        read_all(checkpoint)


@pytest.mark.parametrize(
    "value",
    [[], {}, {"scalars": 1}, {"scalars": {}, "lr": ["x"], "initial_lrs": [1.0], "scheduler": None, "registered": {},
                              "client_state": {}}],
)  # fmt: skip
def test_plain_data_of_another_shape_is_refused(checkpoint, value):
    (checkpoint / "common.pt").write_bytes(to_bytes(value))
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match=r"common\.pt was not written by zerotop"):
        read_all(checkpoint)


def test_a_pickle_that_asks_for_memory_is_refused(checkpoint):
    """Python makes room for the memo entry that a pickle names: here 2**31 of them."""
    (checkpoint / "tensors.json").unlink()
    (checkpoint / ".metadata").write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f.")
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match="a memo index beyond its own length"):
        read_all(checkpoint)


def test_random_states_of_another_shape_are_refused_before_any_is_set(checkpoint):
    import random

    import numpy as np

    from runtime.checkpoint.content.registered import Registered
    from runtime.host import rng

    good = rng.get_state({"mine": np.random.default_rng(1)})
    before = rng.get_state()
    for bad in ({"torch": torch.zeros(3)}, {"python": (3, (1, 2), None)}, {"numpy": ["MT19937", [1], 0, 0, 0.0]},
                {"generators": {"mine": 3}}):  # fmt: skip
        (checkpoint / "rng-0.pt").write_bytes(to_bytes({**good, **bad}))
        reseal(checkpoint)
        with pytest.raises(CheckpointError, match=r"rng-0\.pt was not written by zerotop"):
            read_all(checkpoint)
    registered = Registered()
    registered.add("mine", np.random.default_rng(2))
    state = good["generators"]["mine"]
    registered.check({"mine": state})
    for wrong in ({}, {**state["state"], "state": {"state": "x", "inc": 1}}, None):
        with pytest.raises(CheckpointError, match="the checkpoint's state does not fit a numpy"):
            registered.check({"mine": {"kind": state["kind"], "state": wrong}})
    assert torch.equal(rng.get_state()["torch"], before["torch"]) and random.getstate() == before["python"]
