"""Gathered parameters on a CPU are mapped by themselves, whatever was allocated and freed before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.harness.waiting import patient

PROBE = """
import torch
from runtime.host.heap import MAPPED_FROM, mapped

torch.empty(20 * MAPPED_FROM, dtype=torch.uint8)  # freed at once, which raises glibc's own threshold
gathered = torch.empty(0, dtype=torch.uint8)
with mapped():
    gathered.untyped_storage().resize_(8 * MAPPED_FROM)
gathered = torch.tensor([], dtype=torch.uint8).set_(gathered.untyped_storage())
activation = torch.empty(8 * MAPPED_FROM, dtype=torch.uint8)
heap = next(line for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]"))
start, end = (int(edge, 16) for edge in heap.split()[0].split("-"))
print(*(start <= tensor.data_ptr() < end for tensor in (gathered, activation)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("users", "in_heap"), [({}, "False True"), ({"MALLOC_MMAP_THRESHOLD_": str(1 << 30)}, "True True")]
)
def test_what_is_gathered_is_mapped_unless_the_user_says_otherwise(users: dict[str, str], in_heap: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(
        command, env=environment | users, capture_output=True, text=True, timeout=patient(100), check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, in_heap), done.stderr
