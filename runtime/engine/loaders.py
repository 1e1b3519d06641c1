"""The loaders that the engine makes of a script's data sets: `initialize(training_data=...)`, `engine.deepspeed_io`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler

from runtime.comm import Comm
from runtime.config import ConfigError, Resolved
from runtime.data.loader import ResumableLoader, ResumableSampler

Collate = Callable[[Any], Any] | None

TRAIN = "train"
ROUTES = (TRAIN, "eval", "predict")


def check_data(data: Any, call: str) -> None:
    """Raises ConfigError unless `data` has a length, of at least one sample. call: what it was given to."""
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise ConfigError(
            f"{call}: expected a data set with a length (a torch.utils.data.Dataset), got {type(data).__name__}; "
            "create a DataLoader yourself"
        )
    if len(data) == 0:
        raise ConfigError(f"{call}: expected at least one sample, got an empty data set")


def training_loader(
    data: Dataset[Any],
    collate_fn: Collate,
    config: Resolved,
    comm: Comm,
    micro_steps: Callable[[], int],
    batch_size: int | None = None,
    **options: Any,
) -> ResumableLoader:
    """This rank's share of `data`, in another order each epoch. batch_size: of this rank; default: the config's.
    options: DataLoader's."""
    sampler = ResumableSampler(
        len(data),  # type: ignore[arg-type]
        comm.rank,
        comm.world_size,
        batch_size or config.micro_batch,
        config.zerotop.train.seed,
        config.dataloader_drop_last,
        micro_steps=micro_steps,
    )
    options.setdefault("pin_memory", comm.device.type == "cuda")
    return ResumableLoader(data, sampler, collate_fn=collate_fn, **options)


def loader_of(
    data: Dataset[Any],
    route: str,
    collate_fn: Collate,
    config: Resolved,
    comm: Comm,
    micro_steps: Callable[[], int],
    batch_size: int | None,
    sampler: Sampler[Any] | None,
    workers: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    """The loader of `engine.deepspeed_io`, see there."""
    check_data(data, "engine.deepspeed_io(dataset)")
    if route not in ROUTES:
        raise ConfigError(f"engine.deepspeed_io(route={route!r}): expected one of {', '.join(ROUTES)}")
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory and comm.device.type == "cuda"}
    if sampler is None and route == TRAIN:
        return training_loader(data, collate_fn, config, comm, micro_steps, batch_size, **options)
    return DataLoader(
        data,
        batch_size=batch_size or config.micro_batch,
        sampler=sampler or SequentialSampler(data),  # type: ignore[arg-type]
        collate_fn=collate_fn,
        drop_last=config.dataloader_drop_last,
        **options,
    )
