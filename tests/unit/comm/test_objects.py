"""Small values between ranks: what goes in comes out, and what another process sends is never a program."""

from __future__ import annotations

import ast
import json
import math
import os
import pickle
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from runtime.comm import objects
from runtime.comm.objects import ObjectError, pack, unpack
from runtime.host import rng
from runtime.wire.signature import GROUP_KEY_VARIABLE, SignatureError
from tests.harness import ROOT
from tests.harness.ranks import Ranks
from tests.harness.waiting import patient


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**70),
        0.1,
        math.inf,
        "",
        "caf\udce9 \u2603",
        b"\x00\xff",
        [],
        (),
        {},
        [1, [2, (3, [4])]],
        (1, "a", None, (2.5,)),
        {1: "int", "1": "text", (2, "b"): {"deep": [b"x"]}, None: False},
        {"tuple": [1], "dict": [], "tensor": 5},
    ],
    ids=str,
)
def test_plain_values_come_back_equal_and_of_their_types(value: Any) -> None:
    back = unpack(pack(value))
    assert back == value and type(back) is type(value)
    assert repr(back) == repr(value)


@pytest.mark.parametrize("dtype", list(objects._DTYPES.values()), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (2, 3, 4)], ids=str)
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 100).to(dtype)
    back = unpack(pack({"a": [tensor]}))["a"][0]
    assert back.dtype == dtype and back.shape == tensor.shape
    assert torch.equal(back, tensor)


def test_random_number_states_come_back() -> None:
    drawn = random.random(), np.random.rand(), torch.rand(1)
    state = unpack(pack(rng.get_state({"mine": np.random.default_rng(5)})))
    expected = random.random(), np.random.rand(), torch.rand(3)
    rng.set_state(state)
    again = random.random(), np.random.rand(), torch.rand(3)
    assert again[:2] == expected[:2] and torch.equal(again[2], expected[2]) and drawn is not None


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, Path("/x"), torch.zeros(2, dtype=torch.complex64), print],
    ids=["object", "set", "path", "complex", "function"],
)
def test_what_is_no_plain_value_is_a_fault_of_the_sender(value: Any) -> None:
    with pytest.raises(TypeError, match="can't be sent to other ranks"):
        pack([value])


class Program:
    def __reduce__(self) -> Any:
        return os.abort, ()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"{",
        b"\xff",
        b'{"a":1,"b":2}',
        b'{"program":[]}',
        b'{"tensor":["object",[1],"AAAA"]}',
        b'{"tensor":["float32",[1000000000000],"AAAA"]}',
        b'{"tensor":["float32",[1],"!!!!"]}',
        b'{"dict":[1]}',
        b'{"dict":[[{"dict":[]},1]]}',
        b'{"tuple":5}',
        b"[" * 100_000,
        b'{"tuple":' * 900 + b"[]" + b"}" * 900,
        pickle.dumps(Program()),
    ],
    ids=range(14),
)
def test_what_is_no_value_of_ours_is_an_error_and_does_nothing(sent: bytes) -> None:
    with pytest.raises(ObjectError):
        unpack(sent)


def exchange_values() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for value in (None, "x" * (rank * 1000), {"rank": rank, "big": torch.arange(100 * rank)}):
        found = objects.gather(value, None)
        assert len(found) == world and repr(found[rank]) == repr(value)
    assert [len(text) for text in objects.gather("x" * (rank * 1000), None)] == [r * 1000 for r in range(world)]
    assert objects.broadcast([rank, (1, 2)], None) == [0, (1, 2)]


def test_every_rank_gets_every_value(ranks: Callable[[int], Ranks]) -> None:
    ranks(3).run(exchange_values)


def meet_a_pickle() -> str:
    """Rank 1 answers as torch's all_gather_object does, with the pickle of a program."""
    if dist.get_rank() == 1:
        objects._next_place(None)  # the exchange counts on both sides
        content = torch.frombuffer(bytearray(pickle.dumps(Program())), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        dist.all_gather(sizes, torch.tensor([content.numel()]))
        padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
        padded[: content.numel()] = content
        dist.all_gather([torch.empty_like(padded) for _ in range(2)], padded)
        return ""
    try:
        objects.gather("x", None)
    except ObjectError as error:
        return str(error)
    return "it was taken"


def test_a_peer_that_sends_a_program_is_refused(ranks: Callable[[int], Ranks]) -> None:
    assert ranks(2).run(meet_a_pickle)[0] == "a rank has sent a malformed value: UnicodeDecodeError"


def speak_without_the_key(number: int) -> str:
    """Rank 1 signs for another exchange, or with another key, or not at all."""
    os.environ[GROUP_KEY_VARIABLE] = "secret"
    try:
        objects.gather("sound", None)
        if dist.get_rank() == 1 and number == 1:
            os.environ[GROUP_KEY_VARIABLE] = "guessed"
        elif dist.get_rank() == 1 and number == 2:
            del os.environ[GROUP_KEY_VARIABLE]
        elif dist.get_rank() == 1 and number == 3:
            objects._next_place(None)
        return str(objects.gather("forged", None))
    except (ObjectError, SignatureError) as error:
        return str(error)
    finally:
        os.environ.pop(GROUP_KEY_VARIABLE, None)
        if dist.get_rank() == 0 and number == 3:
            objects._next_place(None)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_what_no_rank_of_the_run_has_signed_is_refused(ranks: Callable[[int], Ranks], number: int) -> None:
    told = ranks(2).run(speak_without_the_key, number)[0]
    if number == 0:
        assert told == "['forged', 'forged']"
    else:
        assert "a value received as rank 1's has a wrong signature" in told


def test_no_part_of_the_trainer_calls_a_collective_that_loads_pickles() -> None:
    """torch.distributed's object collectives, and whatever of torch or Python would unpickle what a process sends."""
    pickling = {
        "all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list", "send_object_list",
        "recv_object_list", "reduce_scatter_object", "_DistWrapper",
    }  # fmt: skip
    found = []
    for path in sorted((ROOT / "runtime").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            imported = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            if ({name} | imported) & pickling:
                found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    assert found == []


def test_a_rank_has_as_many_descriptors_as_the_system_gives() -> None:
    """A thousand connections to a rank's port, from anybody, must not end it at the usual soft limit."""
    program = (
        "import json, resource\nfrom runtime.comm import join_world\njoin_world('cpu')\n"
        "print(json.dumps(resource.getrlimit(resource.RLIMIT_NOFILE)))"
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard)),
        capture_output=True, text=True, timeout=patient(100),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [hard, hard]
