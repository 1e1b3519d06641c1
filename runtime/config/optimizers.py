"""The `optimizer` section. An optimizer fits ZeRO's flat ranges when it treats every element by itself."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from .section import Betas, Flag, Num, Pair, Section

DEFAULT_ADAM_LR = 3e-4
"""Learning rate of AdamW when there is no optimizer section, or when its lr is "auto"."""

NonNegative = Annotated[Num, Field(ge=0)]
Positive = Annotated[Num, Field(gt=0)]
Fraction = Annotated[Num, Field(ge=0, lt=1)]


class AdamParams(Section):
    """`optimizer.params` of Adam and AdamW, with DeepSpeed's defaults."""

    lr: NonNegative = 1e-3
    """Learning rate."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the running averages of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegative | None = None
    """Weight decay. Unset: 0 as in DeepSpeed, or with torch_adam what torch takes (0.01 for AdamW)."""
    bias_correction: Flag = True
    """Whether the running averages are corrected for starting at zero."""
    adam_w_mode: Flag = True
    """Whether weights decay directly (AdamW) or through the gradient (L2). Type AdamW always decays directly."""
    torch_adam: Flag = False
    """Asks DeepSpeed for torch's implementation; here it only chooses torch's default weight_decay."""


class _TorchParams(Section):
    maximize: Flag = False
    """Ascend instead of descend."""


class SgdParams(_TorchParams):
    """`optimizer.params` of torch.optim.SGD."""

    lr: NonNegative = 1e-3
    """Learning rate."""
    momentum: NonNegative = 0.0
    """Share of the last update that is kept."""
    dampening: Num = 0.0
    """Share of the gradient that momentum leaves out."""
    weight_decay: NonNegative = 0.0
    """Weight decay."""
    nesterov: Flag = False
    """Whether momentum looks ahead."""


class AdamaxParams(_TorchParams):
    """`optimizer.params` of torch.optim.Adamax."""

    lr: NonNegative = 2e-3
    """Learning rate."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the running averages of the gradient and of its square or maximum."""
    eps: NonNegative = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegative = 0.0
    """Weight decay."""


class NAdamParams(AdamaxParams):
    """`optimizer.params` of torch.optim.NAdam."""

    momentum_decay: NonNegative = 4e-3
    """How fast the momentum schedule decays."""
    decoupled_weight_decay: Flag = False
    """Whether weights decay directly instead of through the gradient."""


class RAdamParams(AdamaxParams):
    """`optimizer.params` of torch.optim.RAdam."""

    lr: NonNegative = 1e-3
    """Learning rate."""
    decoupled_weight_decay: Flag = False
    """Whether weights decay directly instead of through the gradient."""


class RmsPropParams(_TorchParams):
    """`optimizer.params` of torch.optim.RMSprop."""

    lr: NonNegative = 1e-2
    """Learning rate."""
    alpha: Fraction = 0.99
    """Decay rate of the running average of the squared gradient."""
    eps: NonNegative = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegative = 0.0
    """Weight decay."""
    momentum: NonNegative = 0.0
    """Share of the last update that is kept."""
    centered: Flag = False
    """Whether the gradient is divided by an estimate of its standard deviation."""


class RpropParams(_TorchParams):
    """`optimizer.params` of torch.optim.Rprop."""

    lr: NonNegative = 1e-2
    """Learning rate."""
    etas: Pair = (0.5, 1.2)
    """Factors on the step size: when the sign of the gradient changes, and when not."""
    step_sizes: Pair = (1e-6, 50.0)
    """Smallest and largest step."""


class AdagradParams(_TorchParams):
    """`optimizer.params` of torch.optim.Adagrad."""

    lr: NonNegative = 1e-2
    """Learning rate."""
    lr_decay: NonNegative = 0.0
    """How fast the learning rate falls."""
    weight_decay: NonNegative = 0.0
    """Weight decay."""
    initial_accumulator_value: NonNegative = 0.0
    """What the sum of squared gradients starts with."""
    eps: NonNegative = 1e-10
    """Added to the denominator."""


class AdadeltaParams(_TorchParams):
    """`optimizer.params` of torch.optim.Adadelta."""

    lr: NonNegative = 1.0
    """Learning rate."""
    rho: Annotated[Num, Field(ge=0, le=1)] = 0.9
    """Decay rate of the running average of the squared gradient."""
    eps: NonNegative = 1e-6
    """Added to the denominator."""
    weight_decay: NonNegative = 0.0
    """Weight decay."""


class AsgdParams(_TorchParams):
    """`optimizer.params` of torch.optim.ASGD."""

    lr: NonNegative = 1e-2
    """Learning rate."""
    lambd: Num = 1e-4
    """Decay of the weights towards the average."""
    alpha: Num = 0.75
    """Power of the learning-rate update."""
    t0: Num = 1e6
    """Step at which averaging starts."""
    weight_decay: NonNegative = 0.0
    """Weight decay."""


PARAMS: dict[str, type[Section]] = {
    "Adam": AdamParams,
    "AdamW": AdamParams,
    "SGD": SgdParams,
    "Adamax": AdamaxParams,
    "NAdam": NAdamParams,
    "RAdam": RAdamParams,
    "RMSprop": RmsPropParams,
    "Rprop": RpropParams,
    "Adagrad": AdagradParams,
    "Adadelta": AdadeltaParams,
    "ASGD": AsgdParams,
}
"""Supported optimizers by their name in torch.optim, and the params each takes."""

_SPELLINGS = {"fusedadam": "AdamW", "deepspeedcpuadam": "AdamW", "cpuadam": "AdamW", "adamw_torch": "AdamW"}

IGNORED_PARAMS = ("foreach", "fused", "capturable", "differentiable")
"""Params of torch.optim that choose an implementation, not a result."""

_ONE_BIT = "it compresses gradients to one bit with its own communication, which changes results; zerotop is exact"
_MUP = "it needs parameters annotated by the mup package"
_WHOLE = "it needs whole matrices, and under ZeRO a rank holds only a flat range of each unit"
_NORMS = "it scales by the norm of each whole parameter, and under ZeRO a rank holds only a flat range of each unit"
_LION = "torch.optim has no Lion; a script can give one to initialize(optimizer=...): runtime.ops.lion.FusedLion"
REFUSED: dict[str, str] = {
    "onebitadam": _ONE_BIT,
    "zerooneadam": _ONE_BIT,
    "onebitlamb": _ONE_BIT,
    "lamb": _NORMS,
    "fusedlamb": _NORMS,
    "lars": _NORMS,
    "lion": _LION,
    "fusedlion": _LION,
    "deepspeedcpulion": _LION,
    "muon": _WHOLE,
    "adafactor": _WHOLE,
    "shampoo": _WHOLE,
    "lbfgs": "it needs a closure that recomputes the loss, and one history over all parameters",
    "sparseadam": "it takes sparse gradients only, and gradients land in dense flat buffers here",
    "muadam": _MUP,
    "muadamw": _MUP,
    "musgd": _MUP,
}
"""Optimizers that other tools know, by lower-case name, and why they cannot run here."""


class OptimizerConfig(Section):
    """The optimizer, complete. `type` is the class in torch.optim whose results are reproduced."""

    type: str
    """AdamW, Adam, SGD, Adamax, NAdam, RAdam, RMSprop, Rprop, Adagrad, Adadelta or ASGD. DeepSpeed's Adam without
    adam_w_mode false is AdamW here too."""
    lr: float
    """Learning rate before any scheduler."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam and AdamW only."""
    eps: float = 1e-8
    """Adam and AdamW only."""
    weight_decay: float = 0.0
    """Adam and AdamW only."""
    bias_correction: bool = True
    """Adam and AdamW only. False: both correction terms are 1 at every step."""
    adam_w_mode: bool = False
    """True exactly when type is AdamW."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Other types: the keyword arguments of torch.optim.<type> that the config gives, beside lr."""

    @property
    def is_adam(self) -> bool:
        return self.type in ("Adam", "AdamW")

    def torch_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of `torch.optim.<type>`, which cannot express bias_correction false."""
        if self.is_adam:
            return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        return {"lr": self.lr, **self.extra}


def canonical(name: str) -> str | None:
    """The name in torch.optim that a config's optimizer.type means, or None when it is not a supported one."""
    folded = name.strip().lower()
    return _SPELLINGS.get(folded) or {supported.lower(): supported for supported in PARAMS}.get(folded)


class OptimizerSection(Section):
    """The `optimizer` section as it stands in the file, checked."""

    type: str
    """Name of the optimizer, as in torch.optim; Adam means AdamW unless adam_w_mode is false, as in DeepSpeed."""
    params: (
        AdamParams
        | SgdParams
        | AdamaxParams
        | NAdamParams
        | RAdamParams
        | RmsPropParams
        | RpropParams
        | (AdagradParams | AdadeltaParams | AsgdParams)
    )
    """The optimizer's own settings."""

    def resolve(self, auto_lr: bool) -> OptimizerConfig:
        """The complete optimizer; `auto_lr`: the file says "auto" for lr."""
        params = self.params
        if isinstance(params, AdamParams):
            decoupled = self.type == "AdamW" or params.adam_w_mode
            decay = params.weight_decay
            if decay is None:
                decay = 0.01 if params.torch_adam and decoupled else 0.0
            return OptimizerConfig(
                type="AdamW" if decoupled else "Adam",
                lr=DEFAULT_ADAM_LR if auto_lr else params.lr,
                betas=params.betas,
                eps=params.eps,
                weight_decay=decay,
                bias_correction=params.bias_correction,
                adam_w_mode=decoupled,
            )
        given = params.model_dump(mode="json", exclude_unset=True)  # lists, so that it reads back equal from JSON
        given.pop("lr", None)
        return OptimizerConfig(type=self.type, lr=params.lr, extra=given)
