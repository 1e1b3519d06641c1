"""CausalLM: a Hugging Face causal language model that returns a loss, without ever holding all logits.

The decoder runs as the library wrote it; only its head and the cross-entropy are ours (see cross_entropy.py). Models
differ in what they do to the logits: a factor (Cohere, Granite), a soft cap (Gemma 2), a bias. What is known from the
config is done here; `whole` computes the logits by the model's own forward instead, and the trainer compares both once
before it trains.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.models.cross_entropy import chunked_cross_entropy, liger_cross_entropy, whole_cross_entropy
from runtime.models.origin import Origin

Method = Literal["chunked", "liger", "whole"]


class _Logits(NamedTuple):
    """What a model does to its head's output: softcap * tanh(scale * logits / softcap)."""

    scale: float
    softcap: float | None


class _InsideHead:
    """In the place of the head's input: F.linear of it and the head's weight is `function(weight, bias)`.

    So the loss is computed inside the head's forward, where stage 3 has the weight unsharded, and reshards it after.
    """

    def __init__(self, function: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        self.function = function

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.linear:
            raise TypeError(f"a head that calls {function} on its input, not torch.nn.functional.linear")
        given, weight, bias = (*args, None)[:3]
        return given.function(weight, (kwargs or {}).get("bias", bias))


class CausalLM(nn.Module):
    """`model` (also in peft's wrapper) with cross-entropy as its output.

    method: how the loss is computed (the config's zerotop.model.cross_entropy, with "auto" decided).
    """

    def __init__(self, model: nn.Module, method: Method) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.origin: Origin | None = None
        """What checkpoints and exports say about the model."""

    @property
    def config(self) -> Any:
        """The model's transformers config."""
        return self.base.config

    @property
    def base(self) -> Any:
        """The transformers model, without peft's wrapper."""
        unwrap = getattr(self.model, "get_base_model", None)
        return unwrap() if unwrap is not None else self.model

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        positions: Tensor,
        denominator: float = 1.0,
        counted: int | None = None,
    ) -> Tensor:
        """The sum of the cross-entropies of all targets that are not -100, divided by `denominator`: an fp32 scalar.

        tokens, targets, positions: int64 [rows, length]. Positions that start again at 0 begin a new document, which
        sees nothing of those before it. counted: number of targets that are not -100; without it the host waits for a
        GPU to count them. A mixture of experts whose config asks for `output_router_logits` adds its
        auxiliary loss, which is not divided.
        """
        router = bool(getattr(self.config.get_text_config(), "output_router_logits", False))
        if self.method == "whole":
            output = self.base(input_ids=tokens, position_ids=positions, use_cache=False)
            total = whole_cross_entropy(output.logits.flatten(0, 1), targets.flatten())
        else:
            output = self.base.get_decoder()(input_ids=tokens, position_ids=positions, use_cache=False)
            total = self._cross_entropy(output.last_hidden_state.flatten(0, 1), targets.flatten(), counted)
        loss = total / denominator
        if router and output.router_logits is not None and self.training:
            loss = loss + self._router_loss(output.router_logits)
        return loss

    def _cross_entropy(self, hidden: Tensor, targets: Tensor, counted: int | None) -> Tensor:
        head = self.base.get_output_embeddings()
        if not _is_linear(head):  # adapters on the head, or a head that is no linear layer
            return whole_cross_entropy(head(hidden), targets)
        scale, softcap = self._logits()
        if self.method == "liger":

            def compute(weight: Tensor, bias: Tensor | None) -> Tensor:
                return liger_cross_entropy(hidden, weight, targets, bias=bias, scale=scale, softcap=softcap)
        else:

            def compute(weight: Tensor, bias: Tensor | None) -> Tensor:
                return chunked_cross_entropy(
                    hidden, weight, targets, bias=bias, scale=scale, softcap=softcap, counted=counted
                )

        total: Tensor = head(_InsideHead(compute))
        return total

    def _logits(self) -> _Logits:
        text = self.config.get_text_config()
        scale = 1.0
        if (factor := getattr(text, "logit_scale", None)) is not None:
            scale = float(factor)
        elif (divisor := getattr(text, "logits_scaling", None)) is not None:
            scale = 1.0 / float(divisor)
        cap = getattr(text, "final_logit_softcapping", None)
        return _Logits(scale, None if cap is None else float(cap))

    def _router_loss(self, router_logits: Any) -> Tensor:
        """coefficient * the load-balancing loss that the model's own file defines, over this micro-batch."""
        text = self.config.get_text_config()
        function = sys.modules[type(self.base).__module__].load_balancing_loss_func  # type: ignore[attr-defined]
        experts = getattr(text, "num_local_experts", None) or text.num_experts
        balance = function(router_logits, experts, text.num_experts_per_tok)
        return float(text.router_aux_loss_coef) * balance

    @torch.no_grad()
    def agrees(self, tokens: Tensor, targets: Tensor, positions: Tensor) -> bool:
        """Whether the loss of this batch is that of the model's own logits, to rounding. Collective at stage 3."""
        method = self.method
        losses = []
        for self.method in ("whole", method):
            losses.append(self(tokens, targets, positions).double())
        exact = next(self.model.parameters()).dtype == torch.float32
        return bool((losses[0] - losses[1]).abs() <= (1e-4 if exact else 2e-2) * losses[0].abs() + 1e-6)


def _is_linear(head: nn.Module) -> bool:
    """Whether the head is a linear layer without adapters, also in peft's wrapper of one that is trained as a whole."""
    trained = getattr(head, "modules_to_save", None)
    return type(head) is nn.Linear or (
        trained is not None and all(type(module) is nn.Linear for module in trained.values())
    )
