"""The global gradient norm and all that ranks must agree on at a boundary, in one small all-reduce."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import torch

from runtime import native
from runtime.comm import Comm
from runtime.comm.host_sums import HostSum
from runtime.zero.flat import FlatParamGroup
from runtime.zero.step_decision import Decided, StepDecision

FIGURES = 7
"""Numbers that the ranks sum at a boundary: see `sync_step_stats`."""


class StepStats(NamedTuple):
    """What all ranks agree on at a boundary."""

    grad_norm: float
    """L2 norm of the mean gradient (before clipping); inf or nan when a gradient is."""
    loss: float | None
    """Mean over micro-steps and ranks; None if the script ran loss.backward() itself on a loss that the engine has not
    seen."""
    command_waits: bool
    """Whether rank 0 has commands that all ranks must apply."""
    stop_asked: bool
    """Whether some rank must stop (its supervisor is gone)."""
    changed: bool = False
    """Whether on some rank the script has changed parameters since the last step."""
    own_loss: float | None = None
    """This rank's own part in `loss`: its mean over micro-steps."""

    @property
    def skipped(self) -> bool:
        """The step changes nothing, because a gradient is not finite."""
        return not math.isfinite(self.grad_norm)


class PendingStats:
    """The sums over ranks of one boundary, under way: computed on the device and copied to page-locked memory, or
    summed on the host by a thread of their own. So nobody has to wait for them in engine.step()."""

    def __init__(
        self,
        sums: HostCopy | HostSum,
        divisor: float,
        world_size: int,
        loss_is_known: bool,
        own_loss: Callable[[list[float]], float],
        figures: torch.Tensor | None,
        changed: torch.Tensor | bool,
    ) -> None:
        """sums: the 7 numbers of `sync_step_stats`, on their way to the host. own_loss: returns this rank's loss,
        given what `sums` has returned. figures: the sums on the device; None if they are summed on the host. changed:
        whether the script has changed this rank's parameters."""
        self._sums, self._divisor, self._world_size = sums, divisor, world_size
        self._loss_is_known, self._own_loss = loss_is_known, own_loss
        self._figures, self._changed = figures, changed

    def decision(self, limit: float) -> StepDecision:
        """What these statistics decide about the update. limit: see `clip_coefficient`."""
        read = functools.partial(self._decide, limit)
        if self._figures is None:
            return StepDecision(read)
        changed = self._changed if isinstance(self._changed, torch.Tensor) else None
        return StepDecision(read, self._scale_on_device(self._figures[0], limit), changed)

    def _scale_on_device(self, total: torch.Tensor, limit: float) -> torch.Tensor:
        """() fp32: `Decided.scale`, by the arithmetic of `_decide` and `clip_coefficient`."""
        # On a GPU torch multiplies by the inverse of a Python number; it divides by a tensor.
        divisor = torch.full_like(total, self._divisor)
        norm = torch.sqrt(total) / divisor
        coefficient = torch.ones_like(norm)
        if limit > 0:
            coefficient = torch.clamp(torch.full_like(norm, limit) / (norm + 1e-6), max=1.0)
        return torch.where(torch.isfinite(norm), coefficient / divisor, math.nan).to(torch.float32)

    def _decide(self, limit: float) -> Decided:
        total, *_, changes = self._sums.wait()[:FIGURES]
        norm = self._norm(total)
        scale = clip_coefficient(norm, limit) / self._divisor if math.isfinite(norm) else math.nan
        return Decided(scale, changes > 0)

    def _norm(self, total: float) -> float:
        return math.sqrt(total) / self._divisor if total >= 0 else math.nan

    def read(self) -> StepStats:
        """The statistics, on the host, for the training thread. Waits for them. Raises RuntimeError on every rank when
        the ranks ran modules in different orders."""
        numbers = self._sums.wait()
        total, loss_sum, waits, stops, hashes, squares, changes = numbers[:FIGURES]
        if isinstance(self._sums, HostSum):
            self._sums.report()
        # Equal only where all are (Cauchy-Schwarz); whole numbers, so exact.
        if self._world_size * squares != hashes * hashes:
            raise RuntimeError(
                "stage 3: the ranks ran modules in different orders in this step, so all-gathers of "
                "different units were mixed up. Modules that not every rank uses (experts) must be parts of one unit: "
                "name the module around them in zerotop.units, or use zero_optimization.stage 2"
            )
        norm = self._norm(total)
        mean = loss_sum / self._world_size if self._loss_is_known else None
        own_loss = self._own_loss(numbers) if self._loss_is_known else None
        return StepStats(norm, mean, waits > 0, stops > 0, changes > 0, own_loss)


class HostCopy(Protocol):
    """A few numbers on their way to the host."""

    def wait(self) -> list[float]:
        """Returns them when they have arrived."""


class _OnHost:
    def __init__(self, figures: torch.Tensor) -> None:
        self._figures = figures

    def wait(self) -> list[float]:
        return self._figures.tolist()  # type: ignore[no-any-return]


class _FromDevice:
    def __init__(self, figures: torch.Tensor) -> None:
        self._numbers = torch.empty(figures.shape, dtype=figures.dtype, device="cpu", pin_memory=True)
        self._numbers.copy_(figures, non_blocking=True)
        self._arrived = torch.cuda.Event(blocking=True)  # waiting threads sleep
        self._arrived.record(torch.cuda.current_stream(figures.device))

    def wait(self) -> list[float]:
        self._arrived.synchronize()
        return self._numbers.tolist()  # type: ignore[no-any-return]


def arrive_late(device: torch.device) -> bool:
    """Whether statistics reach the host only when the device has come to them."""
    return device.type == "cuda"


def copy_to_host(figures: torch.Tensor) -> HostCopy:
    """Begin to copy `figures` to the host, beside the computing where they are on a GPU."""
    return _FromDevice(figures) if figures.device.type == "cuda" else _OnHost(figures)


def sync_step_stats(
    flats: Sequence[FlatParamGroup],
    comm: Comm,
    loss: torch.Tensor | float | None,
    divisor: float,
    command_waits: bool,
    stop_asked: bool,
    execution_hash: int = 0,
    changed: torch.Tensor | bool = False,
    downloads: Sequence[Future[Any]] | None = None,
) -> PendingStats:
    """Begin one all-reduce of 7 fp64 numbers, the same at every stage and with or without clipping. On a GPU nothing
    here waits for it.

    divisor: turns the summed gradient into the mean (world size x loss scale). Each rank contributes the squares of its
    shard only, even if it has all gradients, so that no element counts twice. execution_hash: a number below 2**20 that
    is equal on ranks that unsharded their units in the same order. downloads: of gradients that are still on their way
    to host memory, where they are summed; None: all gradients are complete, or will be on the device.
    """
    figures = torch.zeros(FIGURES, dtype=torch.float64, device=comm.device)
    if downloads is None:
        figures[0] = _squares(flats, comm)
    for index, number in enumerate((command_waits, stop_asked, execution_hash, execution_hash**2), 2):
        figures[index].fill_(float(number))
    for index, value in ((1, 0.0 if loss is None else loss), (6, changed)):
        if isinstance(value, torch.Tensor):
            figures[index].copy_(value)
        else:
            figures[index].fill_(float(value))
    if downloads is None:
        own_loss = figures[1:2].clone()
        comm.all_reduce(figures).wait()
        copy = copy_to_host(torch.cat([figures, own_loss]))
        return PendingStats(
            copy, divisor, comm.world_size, loss is not None, lambda numbers: numbers[FIGURES], figures, changed
        )
    own = copy_to_host(figures)
    numbers = functools.partial(_numbers_on_host, own, downloads, _parts_of_squares(flats, comm))
    sums = comm.begin_host_sum(numbers, FIGURES)
    return PendingStats(sums, divisor, comm.world_size, loss is not None, lambda _numbers: own.wait()[1], None, changed)


def _numbers_on_host(
    figures: HostCopy, downloads: Sequence[Future[Any]], parts: Sequence[Callable[[], float]]
) -> list[float]:
    """This rank's numbers, on the thread that sums them. parts: the sum of squares of each group, as `_squares` adds
    them up."""
    for download in downloads:
        download.result()
    numbers = figures.wait()
    numbers[0] = functools.reduce(lambda total, part: total + part, [part() for part in parts])
    return numbers


def _parts_of_squares(flats: Sequence[FlatParamGroup], comm: Comm) -> list[Callable[[], float]]:
    """For each group a function that waits for the sum of squares of this rank's shard, on any thread."""
    gradients = [own_gradient(flat, comm) for flat in flats]
    on_gpu = [index for index, gradient in enumerate(gradients) if gradient.device.type == "cuda"]  # not offloaded
    sums = copy_to_host(_on_gpu([gradients[index] for index in on_gpu])) if on_gpu else None
    parts: list[Callable[[], Any]] = []
    for index, flat in enumerate(flats):
        job = flat.gradients.sum_of_squares_job if flat.gradients is not None else None
        if sums is not None and index in on_gpu:
            parts.append(functools.partial(_number, sums, on_gpu.index(index)))
        elif job is not None:
            parts.append(job.result)
        else:  # the script has changed it since its download
            parts.append(functools.partial(sum_of_squares, gradients[index]))
    return parts


def _number(numbers: HostCopy, index: int) -> float:
    return numbers.wait()[index]


def _squares(flats: Sequence[FlatParamGroup], comm: Comm) -> torch.Tensor | float:
    """Sum of squares of this rank's shards, group by group in fp64 and added up in order, so that the same gradients
    give the same bits. If all are on a GPU, a () tensor there, because reading it would make the host wait."""
    parts: list[torch.Tensor | float | None] = [
        flat.gradients.sum_of_squares() if flat.gradients is not None else None  # taken as they arrived
        for flat in flats
    ]
    rest = [index for index, part in enumerate(parts) if part is None]
    on_gpu = [index for index in rest if flats[index].gradient.device.type == "cuda" and native.cuda_available()]
    if on_gpu:
        sums = _on_gpu([own_gradient(flats[index], comm) for index in on_gpu])
        if len(on_gpu) == len(flats):
            return sums[-1]
        for index, part in zip(on_gpu, sums.tolist()[:-1], strict=True):
            parts[index] = part
    for index in rest:
        if parts[index] is None:
            parts[index] = sum_of_squares(own_gradient(flats[index], comm))
    return functools.reduce(lambda total, part: total + part, (part for part in parts if part is not None))


def _on_gpu(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """(len + 1,) fp64: each sum of squares, then their sum."""
    device = gradients[0].device
    work = torch.empty(native.sums_work(gradients), dtype=torch.float64, device=device)
    sums = torch.empty(len(gradients) + 1, dtype=torch.float64, device=device)
    native.cuda_sums_of_squares(gradients, work, sums, stream=torch.cuda.current_stream(device).cuda_stream)
    return sums


def own_gradient(flat: FlatParamGroup, comm: Comm) -> torch.Tensor:
    """(shard,) this rank's shard of the reduced gradient, also at stage 0, where the rank has all of it."""
    low, high = flat.layout.shard(comm.rank)
    return flat.gradient[low - flat.start : high - flat.start]


def sum_of_squares(gradient: torch.Tensor) -> torch.Tensor | float:
    """Sum of squares in fp64, in a fixed order: the same bits at any number of threads."""
    if gradient.device.type == "cpu" and native.available():
        return native.sum_of_squares(gradient, threads=torch.get_num_threads())[0]
    total = torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
    return float(total) if gradient.device.type == "cpu" else total


def clip_coefficient(grad_norm: float, limit: float) -> float:
    """min(1, limit / (grad_norm + 1e-6)), as in torch.nn.utils.clip_grad_norm_; limit 0 means no clipping."""
    return min(1.0, limit / (grad_norm + 1e-6)) if limit > 0 else 1.0
