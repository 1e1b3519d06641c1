"""Training for the tests of numerics: with the engine on a rank, and plain references, each trained once per process.

What `functools.cache` keeps is shared by tests: they compare it and never write into it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.numerics.models import batch, make

STEPS = 20
HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1}


def config(
    stage: int, accumulation: int, clip: float, precision: str = "fp32", optimizer: str = "AdamW", **extra: Any
) -> dict[str, Any]:
    params = (
        {k: list(v) if isinstance(v, tuple) else v for k, v in HYPER.items()} if optimizer == "AdamW" else {"lr": 1e-3}
    )
    base: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": optimizer, "params": params},
    }
    if precision != "fp32":
        base[precision] = {"enabled": True}
    return {**base, **extra}


def micro_batch(step: int, micro: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    first = (micro * world + rank) * 2
    rows = [batch(step, sample) for sample in (first, first + 1)]
    return torch.cat([tokens for tokens, _ in rows]), torch.cat([targets for _, targets in rows])


# ---- with the engine -------------------------------------------------------------------------------------------------
def engine_for(settings, kind="plain"):
    from runtime.engine.initialize import initialize
    from tests.numerics.models import make

    return initialize(model=make(kind), config=settings)[0]


def advance(engine, start: int, end: int) -> None:
    import torch.distributed as dist

    for step in range(start, end):
        for micro in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(*micro_batch(step, micro, dist.get_rank(), dist.get_world_size())))
            engine.step()


def parameters(engine) -> dict[str, torch.Tensor]:
    whole = engine.module.state_dict()
    return {name: whole[name].detach().clone() for name, _ in engine.module.named_parameters()}


def train_with_engine(
    kind: str, settings: dict[str, Any], steps: int = STEPS
) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Parameters by name, global losses and norms, as one rank of the current process group ends up with them."""
    import torch.distributed as dist

    from runtime.engine.initialize import initialize

    rank, world = dist.get_rank(), dist.get_world_size()
    engine, _, _, _ = initialize(model=make(kind), config=settings)
    losses, norms = [], []
    for step in range(steps):
        total = 0.0
        for micro in range(engine.gradient_accumulation_steps()):
            loss = engine(*micro_batch(step, micro, rank, world))
            engine.backward(loss)
            engine.step()
            total += loss.item() / engine.gradient_accumulation_steps()
        losses.append(total)
        norms.append(engine.get_global_grad_norm())
    whole = engine.module.state_dict()  # at stage 3 parameters are there only while they are used
    return {name: whole[name].detach().clone() for name, _ in engine.module.named_parameters()}, losses, norms


# ---- plain references ------------------------------------------------------------------------------------------------
@functools.cache
def train_plainly(
    kind: str, world: int, accumulation: int, clip: float, optimizer: str = "AdamW", steps: int = STEPS
) -> dict[str, torch.Tensor]:
    """The same in one process, plain torch, the whole batch at once. An unused parameter counts as having a zero
    gradient."""
    model = make(kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    numbers = HYPER if optimizer == "AdamW" else {"lr": 1e-3}
    update = getattr(torch.optim, optimizer)(trained, **numbers)
    for step in range(steps):
        rows = [batch(step, sample) for sample in range(2 * world * accumulation)]
        model(torch.cat([t for t, _ in rows]), torch.cat([t for _, t in rows])).backward()
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        update.step()
        update.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def train_plainly_grouped(groups: Any, world: int, steps: int, schedule: Any) -> dict[str, torch.Tensor]:
    """Plain AdamW with parameter groups of their own and a LambdaLR, two samples per rank and step."""
    model = make("plain")
    update = torch.optim.AdamW(groups(model), lr=1e-3, eps=1e-5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(update, schedule)
    for step in range(steps):
        rows = [batch(step, sample) for sample in range(2 * world)]
        model(torch.cat([t for t, _ in rows]), torch.cat([t for _, t in rows])).backward()
        update.step()
        update.zero_grad()
        scheduler.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@functools.cache
def train_plainly_in_bf16(
    kind: str, world: int, accumulation: int, clip: float
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """bf16 parameters beside fp32 masters, gradients of each micro-batch accumulated in fp32: what the engine promises,
    written out."""
    model = make(kind)
    parameters = list(model.parameters())
    masters = [p.detach().clone() for p in parameters]
    update = torch.optim.AdamW(masters, **HYPER)
    model.to(torch.bfloat16)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for master in masters:
            master.grad = torch.zeros_like(master)
        for micro in range(accumulation):
            for rank in range(world):
                loss = model(*micro_batch(step, micro, rank, world))
                (loss / accumulation).backward()
                total += loss.item() / accumulation / world
                for parameter, master in zip(parameters, masters, strict=True):
                    master.grad += parameter.grad.float() / world
                    parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, clip)
        update.step()
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.data.copy_(master)
        losses.append(total)
    return {name: p.detach() for name, p in model.named_parameters()}, losses


# ---- comparing -------------------------------------------------------------------------------------------------------
def assert_equal(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == plain.keys()
    worst = {name: (ours[name].float() - plain[name].float()).abs().max().item() for name in plain}
    assert max(worst.values()) <= tolerance, sorted(worst.items(), key=lambda item: -item[1])[:3]


def message_of(error: type[BaseException], call) -> str:
    """The message with which `call` fails; functions that run on ranks can't use pytest.raises across processes."""
    try:
        call()
    except error as caught:
        return str(caught)
    raise AssertionError(f"no {error.__name__}")
