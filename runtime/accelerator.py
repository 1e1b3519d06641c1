"""`deepspeed.accelerator.get_accelerator()`: the kind of device that ranks of this process train on, as one object.

A thin layer over torch: what is not spelled out here is torch.cuda's or torch.cpu's function of that name.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import psutil
import torch
import torch.distributed as dist


class Accelerator:
    """Of one kind of device, "cuda" or "cpu"."""

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
        """The index; on CPUs this rank's number on its host, as in DeepSpeed."""
        return int(torch.cuda.current_device()) if self._name == "cuda" else int(os.environ.get("LOCAL_RANK", "0"))

    def current_device_name(self) -> str:
        return self.device_name(self.current_device())

    def device_count(self) -> int:
        """GPUs of this host; on CPUs the ranks that share it, as torchrun or DeepSpeed's launcher says."""
        if self._name == "cuda":
            return torch.cuda.device_count()
        return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")

    def set_device(self, device_index: int) -> None:
        if self._name == "cuda":
            torch.cuda.set_device(device_index)

    def device(self, device_index: int | None = None) -> AbstractContextManager[Any]:
        return torch.cuda.device(device_index) if self._name == "cuda" else nullcontext()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._name

    def is_available(self) -> bool:
        return self._name == "cpu" or torch.cuda.is_available()

    def is_synchronized_device(self) -> bool:
        """Whether calls return with their results there."""
        return self._name == "cpu"

    def communication_backend_name(self) -> str:
        return self._communication_backend_name

    # ---- random numbers ----------------------------------------------------------------------------------------------
    def random(self) -> Any:
        return torch.random

    def manual_seed(self, seed: int) -> None:
        torch.cuda.manual_seed(seed) if self._name == "cuda" else torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.cuda.manual_seed_all(seed) if self._name == "cuda" else torch.manual_seed(seed)

    def initial_seed(self) -> int:
        return torch.cuda.initial_seed() if self._name == "cuda" else torch.initial_seed()

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        if self._name == "cpu":
            return torch.get_rng_state()
        return torch.cuda.get_rng_state(self.current_device() if device_index is None else device_index)

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        if self._name == "cpu":
            torch.set_rng_state(new_state)
        else:
            torch.cuda.set_rng_state(new_state, self.current_device() if device_index is None else device_index)

    # ---- memory ------------------------------------------------------------------------------------------------------
    def memory_allocated(self, device_index: int | None = None) -> int:
        """On CPUs the process's resident memory, for nobody counts single tensors there."""
        return _resident() if self._name == "cpu" else torch.cuda.memory_allocated(device_index)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return _resident() if self._name == "cpu" else torch.cuda.max_memory_allocated(device_index)

    def memory_reserved(self, device_index: int | None = None) -> int:
        return _resident() if self._name == "cpu" else torch.cuda.memory_reserved(device_index)

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        return _resident() if self._name == "cpu" else torch.cuda.max_memory_reserved(device_index)

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        if self._name == "cuda":
            torch.cuda.reset_peak_memory_stats(device_index)

    def empty_cache(self) -> None:
        if self._name == "cuda":
            torch.cuda.empty_cache()

    def total_memory(self, device_index: int | None = None) -> int:
        if self._name == "cpu":
            return int(psutil.virtual_memory().total)
        index = self.current_device() if device_index is None else device_index
        return int(torch.cuda.get_device_properties(index).total_memory)

    def available_memory(self, device_index: int | None = None) -> int:
        return (
            int(psutil.virtual_memory().available) if self._name == "cpu" else torch.cuda.mem_get_info(device_index)[0]
        )

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        """On CPUs the tensor itself: there is no device that would read it faster."""
        return tensor.pin_memory() if self._name == "cuda" else tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned() if self._name == "cuda" else True

    # ---- precisions --------------------------------------------------------------------------------------------------
    def is_bf16_supported(self) -> bool:
        return torch.cuda.is_bf16_supported() if self._name == "cuda" else True

    def is_fp16_supported(self) -> bool:
        """fp16 training, that is: on CPUs a config that asks for it is refused."""
        return self._name == "cuda"

    def supported_dtypes(self) -> list[torch.dtype]:
        found = [torch.float32]
        found += [torch.float16] * self.is_fp16_supported() + [torch.bfloat16] * self.is_bf16_supported()
        return found

    def is_triton_supported(self) -> bool:
        return self._name == "cuda" and torch.cuda.get_device_capability()[0] >= 8

    def get_compile_backend(self) -> str:
        return "inductor"


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


_accelerators: dict[str, Accelerator] = {}


def get_accelerator() -> Accelerator:
    """GPUs where there are any and ZEROTOP_DEVICE does not say "cpu"; a process group over Gloo means CPUs, too."""
    on_cpus = os.environ.get("ZEROTOP_DEVICE") == "cpu" or (dist.is_initialized() and dist.get_backend() == "gloo")
    kind = "cuda" if torch.cuda.is_available() and not on_cpus else "cpu"
    return _accelerators.setdefault(kind, Accelerator(kind))


def is_current_accelerator_supported() -> bool:
    return get_accelerator().is_available()
