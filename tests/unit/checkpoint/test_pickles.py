"""torch reads what the torch-free writer writes: every dtype, by torch.load and by torch.distributed.checkpoint."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.checkpoint.format.index import read_index
from runtime.checkpoint.format.manifest import CheckpointError, Manifest
from runtime.checkpoint.format.pickles import metadata_pickle
from runtime.checkpoint.format.shard_reader import read_pieces
from runtime.checkpoint.format.shard_writer import write_parts, write_torch_metadata
from runtime.checkpoint.format.slices import Part, Piece
from runtime.checkpoint.format.tensors import ITEM_BYTES, index_of

NUMEL = 11


def values(dtype: str, numel: int = NUMEL) -> torch.Tensor:
    """(numel,): all kinds of bits, though no NaN, and for bool only 0 and 1."""
    numbers = torch.arange(numel * ITEM_BYTES[dtype], dtype=torch.uint8) % (2 if dtype == "bool" else 100)
    return numbers.view(getattr(torch, dtype))


def write(folder: Path, tensors: dict[str, list[torch.Tensor]]) -> Any:
    """Each tensor in pieces, one after the other. Returns their index."""
    parts, contents = [], []
    for name, pieces in tensors.items():
        start, total = 0, sum(piece.numel() for piece in pieces)
        for piece in pieces:
            parts.append(Part.of(piece, name, start, piece.numel(), total))
            contents.append(memoryview(piece.view(torch.uint8).numpy()))
            start += piece.numel()
    return index_of(write_parts(folder, 3, parts, lambda index: contents[index]))


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_every_dtype_is_read_again(tmp_path, dtype):
    expected = values(dtype)
    index = write(tmp_path, {"param.a": [values(dtype)[:0], expected[:4], expected[4:]]})
    found = torch.zeros_like(expected)
    read_pieces(tmp_path, index.tensors, {"param.a": Piece(found, 0, NUMEL)})
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    for part in index.tensors["param.a"].parts:
        file = (tmp_path / part.file).read_bytes()[part.offset : part.offset + part.nbytes]
        loaded = torch.load(io.BytesIO(file), weights_only=True)
        assert loaded.dtype == expected.dtype
        assert torch.equal(loaded.view(torch.uint8), expected[part.start : part.start + part.numel].view(torch.uint8))
        with zipfile.ZipFile(io.BytesIO(file)) as archive:
            assert archive.testzip() is None
            names = {name.partition("/")[2] for name in archive.namelist()}
            assert names >= {"data.pkl", "byteorder", "data/0", "version"}
        assert not part.numel or file.index(bytes(loaded.view(torch.uint8).numpy())) % 64 == 0


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_tools_read_them(tmp_path):
    from torch.distributed.checkpoint import FileSystemReader, load  # it takes a second to import

    first, second = values("float32", 300), values("bfloat16", 5)
    index = write(tmp_path, {"param.a": [first[:100], first[100:]], "state.exp_avg.a": [second]})
    write_torch_metadata(tmp_path, index.tensors)
    found = {"param.a": torch.zeros(300), "state.exp_avg.a": torch.zeros(5, dtype=torch.bfloat16)}
    load(found, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(found["param.a"], first) and torch.equal(found["state.exp_avg.a"], second)


def test_the_index_is_what_torch_would_write(tmp_path):
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    index = write(tmp_path, {"param.a": [values("float32")[:4], values("float32")[4:]]})
    tensor = index.tensors["param.a"]
    expected = Metadata(
        {
            "param.a": TensorStorageMetadata(
                TensorProperties(dtype=torch.float32),
                torch.Size([NUMEL]),
                [ChunkStorageMetadata(torch.Size([p.start]), torch.Size([p.numel])) for p in tensor.parts],
            )
        },
        storage_data={
            MetadataIndex("param.a", [p.start]): _StorageInfo(p.file, p.offset, p.nbytes) for p in tensor.parts
        },
    )
    found = pickle.loads(metadata_pickle(index.tensors))
    assert found == expected
    assert [vars(one).keys() for one in found.storage_data] == [vars(one).keys() for one in expected.storage_data]


def test_earlier_versions_read_the_index(tmp_path):
    expected = write(tmp_path, {"param.a": [values("float32")]})
    write_torch_metadata(tmp_path, expected.tensors)
    manifest = Manifest(
        step=1, optimizer_step=1, world_size=1, stage=0, precision="fp32", optimizer="adamw", groups=1,
        config_digest="", shapes={"a": [NUMEL]}, frozen=[],
    )  # fmt: skip
    assert read_index(tmp_path, manifest) == expected.tensors


def test_a_dtype_that_no_reader_knows_is_refused():
    with pytest.raises(CheckpointError, match=r"buffer\.a has the dtype complex32, which a checkpoint cannot hold"):
        Part.of(SimpleNamespace(dtype=torch.complex32), "buffer.a", 0, 2, 2)


def test_a_writer_process_imports_no_torch():
    code = "import sys, runtime.checkpoint.saving.writer; print({'torch', 'numpy', 'zmq'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
