"""Large blocks of ranks on a CPU are mapped by themselves, whatever was allocated and freed before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROBE = """
import torch
from runtime.comm import join_world
from runtime.heap import MAPPED_FROM

join_world("cpu")
torch.empty(5 * MAPPED_FROM, dtype=torch.uint8)  # freed at once, which raises glibc's own threshold
block = torch.empty(2 * MAPPED_FROM, dtype=torch.uint8)
small = torch.empty(MAPPED_FROM // 2, dtype=torch.uint8)
heap = next(line for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]"))
start, end = (int(edge, 16) for edge in heap.split()[0].split("-"))
print(*(start <= tensor.data_ptr() < end for tensor in (block, small)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("users", "in_heap"), [({}, "False True"), ({"MALLOC_MMAP_THRESHOLD_": str(1 << 30)}, "True True")]
)
def test_large_blocks_are_mapped_unless_the_user_says_otherwise(users: dict[str, str], in_heap: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, env=environment | users, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, in_heap), done.stderr
