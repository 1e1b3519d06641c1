"""The shared memory of a checkpoint's copy, where CUDA refuses to page-lock it: the run goes on without."""

from __future__ import annotations

import os
import sys

import pytest

torch = pytest.importorskip("torch")

from runtime.checkpoint.saving import snapshot  # noqa: E402
from runtime.host.resident import outside_malloc  # noqa: E402

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memfd is Linux's")


def refuse(address: int, nbytes: int, device: int) -> None:
    raise RuntimeError("CUDA: out of memory (error 2)")


def test_nothing_is_left_of_memory_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "page_lock", refuse)
    monkeypatch.setattr(snapshot, "page_unlock", lambda address: pytest.fail("it was never locked"))
    files, counted = set(os.listdir("/proc/self/fd")), outside_malloc.nbytes
    with pytest.raises(RuntimeError, match="out of memory"):
        snapshot.SharedMemory(1 << 20, torch.device("cuda", 0))
    assert set(os.listdir("/proc/self/fd")) == files
    assert outside_malloc.nbytes == counted
