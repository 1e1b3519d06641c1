"""The streamed optimizer's schedule (csrc/stream.h) under hostile orders: the result is the plain kernel's, and every
wait that is left out shows."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness import ROOT

torch = pytest.importorskip("torch")

from runtime import native  # noqa: E402
from runtime.native.loading import DTYPES, RangeStruct  # noqa: E402

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(not native.available(), reason="the CPU kernels are not built (no C++ compiler)"),
]

CHUNK = 64
WAITS = {"START_IN": 1, "START_OUT": 2, "FREE": 4, "LOADED": 8, "UPDATED": 16, "DONE": 32}
HYPER = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
RATES = (1e-3, 3e-2)  # of the two hypers of a call


class Step(ctypes.Structure):
    _fields_ = (
        ("hyper", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("seen", ctypes.c_void_p),
        ("seen_out", ctypes.c_void_p),
    )


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("mock") / "libmock.so"
    sources = [Path(__file__).with_name("stream_mock.cpp"), ROOT / "csrc/cpu/isa_generic.cpp"]
    command = [COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", *sources, "-o", path]
    subprocess.run([str(part) for part in command], check=True)
    lib = ctypes.CDLL(str(path))
    lib.mock_run.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    lib.mock_run.argtypes += [ctypes.c_void_p, *[ctypes.c_int] * 5]
    return lib


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view({4: torch.int32, 2: torch.int16}[t.element_size()])


def matches(
    mock: ctypes.CDLL,
    seed: int,
    *,
    drop: int = 0,
    slots: int = 3,
    lengths: tuple[int, ...] = (1, 64, 300, 777),
    steps: int = 2,
    grad: torch.dtype = torch.bfloat16,
    out: torch.dtype = torch.bfloat16,
    place: int = 0,
    events: bool = False,
    skips: bool = False,
) -> bool:
    """Whether `steps` streamed steps in the order of `seed` show the bits of plain steps wherever somebody looks.
    skips: the kernels write nothing, and so everything must stay as it is."""
    gen = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    p, m, v = torch.randn(n, generator=gen), torch.zeros(n), torch.zeros(n)
    q, a, b = p.clone(), m.clone(), v.clone()
    g = torch.full((n,), float("nan"), dtype=grad)  # arrives on the caller's stream
    o = torch.randn(n, generator=gen).to(out) if skips else torch.full((n,), float("nan"), dtype=out)
    unchanged = o.clone()
    ranges, low = [], 0
    for index, length in enumerate(lengths):
        places = [t[low : low + length].data_ptr() if length else 0 for t in (p, m, v, g, o)]
        ranges.append(RangeStruct(*places, length, index % 2, place))
        low += length
    seen, seen_out, structs, keep, wanted = [], [], [], [], []
    for step in range(1, steps + 1):
        gradient = torch.randn(n, generator=gen).to(grad)
        hypers = [native.hyper(step=step, lr=lr, grad_scale=0.5, adamw=True, **HYPER) for lr in RATES]
        array = (native.Hyper * 2)(*hypers)
        seen.append(torch.full((max(n, 1),), float("nan")))
        seen_out.append(torch.full((n,), float("nan"), dtype=out))
        structs.append(Step(ctypes.addressof(array), gradient.data_ptr(), seen[-1].data_ptr(), seen_out[-1].data_ptr()))
        keep += [array, gradient]
        want_out, low = unchanged.clone(), 0
        for index, length in enumerate(lengths if not skips else ()):
            part = slice(low, low + length)
            native.adamw(
                *(t[part] for t in (q, a, b, gradient, want_out)),
                step=step, lr=RATES[index % 2], grad_scale=0.5, **HYPER,
            )  # fmt: skip
            low += length
        wanted.append((q.clone() if n else torch.tensor([float(step)]), want_out))
    code = mock.mock_run(
        seed,
        drop,
        CHUNK,
        slots,
        (RangeStruct * len(ranges))(*ranges),
        len(ranges),
        (Step * steps)(*structs),
        steps,
        DTYPES[str(grad)],
        DTYPES[str(out)],
        int(events),
        int(skips),
    )
    assert code == 0, "a deadlock" if code == -1 else code
    found = zip(seen, seen_out, strict=True)
    return all(
        torch.equal(bits(x), bits(y)) for pair, want in zip(found, wanted, strict=True)
        for x, y in zip(pair, want, strict=True)
    )  # fmt: skip


DTYPE_PAIRS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float16),
    (torch.float32, torch.float32),
]


@pytest.mark.parametrize("place", [0, 1, 2, 3], ids=["all-on-gpu", "grad-on-host", "out-on-host", "both-on-host"])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair))
def test_every_order_gives_the_bits_of_the_plain_kernel(
    mock: ctypes.CDLL, dtypes: tuple[torch.dtype, torch.dtype], place: int
) -> None:
    for seed in range(40):
        slots = 1 + seed % 5
        assert matches(mock, seed, slots=slots, grad=dtypes[0], out=dtypes[1], place=place), (seed, slots)


@pytest.mark.parametrize("events", [False, True], ids=["streams", "events"])
def test_shapes_that_bring_races_to_light(mock: ctypes.CDLL, events: bool) -> None:
    """One element more or less than a slot or than all slots, and nothing at all."""
    for lengths in ((63,), (64,), (65,), (192,), (193,), (64,) * 7, (1,) * 9, (0, 5, 0), (0,), ()):
        for seed in range(25):
            assert matches(mock, seed, lengths=lengths, events=events), (lengths, seed)


@pytest.mark.parametrize("place", [0, 1, 2, 3], ids=["all-on-gpu", "grad-on-host", "out-on-host", "both-on-host"])
def test_a_skipped_step_brings_everything_back_as_it_was(mock: ctypes.CDLL, place: int) -> None:
    for seed in range(40):
        assert matches(mock, seed, slots=1 + seed % 5, place=place, skips=True), seed


@pytest.mark.parametrize("wait", WAITS)
def test_every_wait_that_is_left_out_shows(mock: ctypes.CDLL, wait: str) -> None:
    empty = {"lengths": ()} if wait == "START_OUT" else {}  # with elements, LOADED and UPDATED imply it
    caught = sum(not matches(mock, seed, drop=WAITS[wait], **empty) for seed in range(60))
    assert caught >= 10, f"without {wait} only {caught} of 60 orders go wrong"
    assert all(matches(mock, seed, **empty) for seed in range(60))
