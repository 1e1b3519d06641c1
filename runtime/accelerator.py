"""`deepspeed.accelerator.get_accelerator()`: one API for the kind of device that this process trains on.

A thin layer over torch: any other attribute is torch.cuda's or torch.cpu's of that name.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import psutil
import torch
import torch.distributed as dist


class Accelerator:
    """Device functions for "cuda" or "cpu"."""

    def __init__(self, kind: str) -> None:
        self._name = kind
        self._module: Any = torch.cuda if kind == "cuda" else torch.cpu
        self._communication_backend_name = "nccl" if kind == "cuda" else "gloo"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_module" not in self.__dict__:
            raise AttributeError(name)
        try:
            return getattr(self._module, name)
        except AttributeError:
            raise AttributeError(f"neither the accelerator nor {self._module.__name__} has {name!r}") from None

    # ---- devices -----------------------------------------------------------------------------------------------------
    def device_name(self, device_index: int | None = None) -> str:
        """ "cuda", or "cuda:3" with an index; "cpu" always on CPUs."""
        return self._name if device_index is None or self._name == "cpu" else f"{self._name}:{device_index}"

    def current_device(self) -> int:
        """Index of the current device; on CPUs the local rank, as in DeepSpeed."""
        return int(torch.cuda.current_device()) if self._name == "cuda" else int(os.environ.get("LOCAL_RANK", "0"))

    def current_device_name(self) -> str:
        """`device_name` of the current device."""
        return self.device_name(self.current_device())

    def device_count(self) -> int:
        """Number of GPUs of this host; on CPUs the local world size."""
        if self._name == "cuda":
            return torch.cuda.device_count()
        return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")

    def set_device(self, device_index: int) -> None:
        """Make a GPU the current device."""
        if self._name == "cuda":
            torch.cuda.set_device(device_index)

    def device(self, device_index: int | None = None) -> AbstractContextManager[Any]:
        """Context in which a GPU is the current device."""
        return torch.cuda.device(device_index) if self._name == "cuda" else nullcontext()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is on this kind of device."""
        return tensor.device.type == self._name

    def is_available(self) -> bool:
        """Whether there is such a device."""
        return self._name == "cpu" or torch.cuda.is_available()

    def is_synchronized_device(self) -> bool:
        """Whether operations are synchronous."""
        return self._name == "cpu"

    def communication_backend_name(self) -> str:
        """Backend for the process group: "nccl" or "gloo"."""
        return self._communication_backend_name

    # ---- random numbers ----------------------------------------------------------------------------------------------
    def random(self) -> Any:
        """The module torch.random."""
        return torch.random

    def manual_seed(self, seed: int) -> None:
        """Seed the current device's generator."""
        torch.cuda.manual_seed(seed) if self._name == "cuda" else torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed the generators of all devices."""
        torch.cuda.manual_seed_all(seed) if self._name == "cuda" else torch.manual_seed(seed)

    def initial_seed(self) -> int:
        """The seed of the current device's generator."""
        return torch.cuda.initial_seed() if self._name == "cuda" else torch.initial_seed()

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        """The generator state of a device (default: the current one)."""
        if self._name == "cpu":
            return torch.get_rng_state()
        return torch.cuda.get_rng_state(self.current_device() if device_index is None else device_index)

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        """Set the generator state of a device (default: the current one)."""
        if self._name == "cpu":
            torch.set_rng_state(new_state)
        else:
            torch.cuda.set_rng_state(new_state, self.current_device() if device_index is None else device_index)

    # ---- memory ------------------------------------------------------------------------------------------------------
    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes in tensors; on CPUs the resident memory of the process."""
        return _resident() if self._name == "cpu" else torch.cuda.memory_allocated(device_index)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """Peak of `memory_allocated`; on CPUs its current value."""
        return _resident() if self._name == "cpu" else torch.cuda.max_memory_allocated(device_index)

    def memory_reserved(self, device_index: int | None = None) -> int:
        """Bytes that torch's allocator holds; on CPUs the resident memory of the process."""
        return _resident() if self._name == "cpu" else torch.cuda.memory_reserved(device_index)

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        """Peak of `memory_reserved`; on CPUs its current value."""
        return _resident() if self._name == "cpu" else torch.cuda.max_memory_reserved(device_index)

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Reset the peaks; does nothing on CPUs."""
        if self._name == "cuda":
            torch.cuda.reset_peak_memory_stats(device_index)

    def empty_cache(self) -> None:
        """Free the allocator's unused memory; does nothing on CPUs."""
        if self._name == "cuda":
            torch.cuda.empty_cache()

    def total_memory(self, device_index: int | None = None) -> int:
        """Total memory of a GPU, or of the host, in bytes."""
        if self._name == "cpu":
            return int(psutil.virtual_memory().total)
        index = self.current_device() if device_index is None else device_index
        return int(torch.cuda.get_device_properties(index).total_memory)

    def available_memory(self, device_index: int | None = None) -> int:
        """Free memory of a GPU, or of the host, in bytes."""
        return (
            int(psutil.virtual_memory().available) if self._name == "cpu" else torch.cuda.mem_get_info(device_index)[0]
        )

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        """A pinned copy of `tensor`; on CPUs the tensor itself."""
        return tensor.pin_memory() if self._name == "cuda" else tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is pinned; always True on CPUs."""
        return tensor.is_pinned() if self._name == "cuda" else True

    # ---- precisions --------------------------------------------------------------------------------------------------
    def is_bf16_supported(self) -> bool:
        """Whether bf16 training is supported."""
        return torch.cuda.is_bf16_supported() if self._name == "cuda" else True

    def is_fp16_supported(self) -> bool:
        """Whether fp16 training is supported; on CPUs a config with fp16 is refused."""
        return self._name == "cuda"

    def supported_dtypes(self) -> list[torch.dtype]:
        """The dtypes that models can be trained in."""
        found = [torch.float32]
        found += [torch.float16] * self.is_fp16_supported() + [torch.bfloat16] * self.is_bf16_supported()
        return found

    def is_triton_supported(self) -> bool:
        """Whether Triton supports the GPU."""
        return self._name == "cuda" and torch.cuda.get_device_capability()[0] >= 8

    def get_compile_backend(self) -> str:
        """Default backend of torch.compile."""
        return "inductor"


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


_accelerators: dict[str, Accelerator] = {}


def get_accelerator() -> Accelerator:
    """The accelerator of this process: GPUs if there are any, unless ZEROTOP_DEVICE is "cpu" or the process group uses
    Gloo."""
    on_cpus = os.environ.get("ZEROTOP_DEVICE") == "cpu" or (dist.is_initialized() and dist.get_backend() == "gloo")
    kind = "cuda" if torch.cuda.is_available() and not on_cpus else "cpu"
    return _accelerators.setdefault(kind, Accelerator(kind))


def is_current_accelerator_supported() -> bool:
    """Whether the current accelerator is available."""
    return get_accelerator().is_available()
