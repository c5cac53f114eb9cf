"""Constructor arguments of the optimizers in the table, as options: names, types, defaults.

They are declared here so that a recipe is parsed without torch; a test compares them with the constructors. Options of
a user's optimizer are read from its constructor, in `raytrain.optim.optimizers`.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, model_validator

from raytrain.optim.options import OptimizerOptions, with_rules

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Decay of an exponential moving average, per step."""
Betas = tuple[Decay, Decay]


class ForeachOptions(OptimizerOptions):
    """Options of an optimizer with a multi-tensor (foreach) implementation.

    Attributes:
        foreach: whether to use it; default: where it is faster.
    """

    foreach: bool | None = None


class FusedOptions(ForeachOptions):
    """Options of an optimizer with a fused implementation on CPUs and GPUs.

    Attributes:
        fused: whether to use it; default: yes, unless `foreach`.
    """

    fuses = True
    fused: bool | None = None

    @model_validator(mode="after")
    def _one_kernel(self) -> Self:
        if self.fused and self.foreach:
            raise ValueError(f"{self.name} takes optimizer.fused or optimizer.foreach, and not both")
        return self


class SgdOptions(FusedOptions):
    """Options of sgd."""

    lr: NonNegativeFloat = 1e-3
    momentum: NonNegativeFloat = 0.0
    dampening: float = 0.0
    weight_decay: NonNegativeFloat = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_fits(self) -> Self:
        if self.nesterov and (not self.momentum or self.dampening):
            raise ValueError("optimizer.nesterov takes optimizer.momentum above 0 and optimizer.dampening = 0")
        return self


class AdamWOptions(FusedOptions):
    """Options of adamw."""

    lr: NonNegativeFloat = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 1e-2
    amsgrad: bool = False


class AdamOptions(AdamWOptions):
    """Options of adam."""

    weight_decay: NonNegativeFloat = 0.0
    decoupled_weight_decay: bool = False


class NAdamWOptions(ForeachOptions):
    """Options of nadamw."""

    lr: NonNegativeFloat = 2e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 1e-2
    momentum_decay: NonNegativeFloat = 4e-3


class NAdamOptions(NAdamWOptions):
    """Options of nadam."""

    weight_decay: NonNegativeFloat = 0.0
    decoupled_weight_decay: bool = False


class RAdamOptions(ForeachOptions):
    """Options of radam."""

    lr: NonNegativeFloat = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    decoupled_weight_decay: bool = False


class AdagradOptions(FusedOptions):
    """Options of adagrad."""

    lr: NonNegativeFloat = 1e-2
    lr_decay: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.0
    initial_accumulator_value: NonNegativeFloat = 0.0
    eps: NonNegativeFloat = 1e-10


class RMSpropOptions(ForeachOptions):
    """Options of rmsprop."""

    lr: NonNegativeFloat = 1e-2
    alpha: NonNegativeFloat = 0.99
    eps: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    momentum: NonNegativeFloat = 0.0
    centered: bool = False


class AdaBeliefOptions(ForeachOptions):
    """Options of adabelief."""

    shared = frozenset({"n_sma_threshold", "degenerated_to_sgd"})
    lr: NonNegativeFloat = 1e-3
    betas: Betas = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    weight_decouple: bool = True
    fixed_decay: bool = False
    rectify: bool = False
    n_sma_threshold: int = 5
    degenerated_to_sgd: bool = True
    ams_bound: bool = False
    eps: NonNegativeFloat = 1e-16


class AdanOptions(ForeachOptions):
    """Options of adan."""

    lr: NonNegativeFloat = 1e-3
    betas: tuple[Decay, Decay, Annotated[float, Field(ge=0, le=1)]] = (0.98, 0.92, 0.99)
    weight_decay: NonNegativeFloat = 0.0
    weight_decouple: bool = False
    max_grad_norm: NonNegativeFloat = 0.0
    eps: NonNegativeFloat = 1e-8


class LambOptions(OptimizerOptions):
    """Options of lamb."""

    lr: NonNegativeFloat = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.0


class LionOptions(ForeachOptions):
    """Options of lion."""

    lr: NonNegativeFloat = 1e-4
    betas: Betas = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.0
    weight_decouple: bool = True
    fixed_decay: bool = False


class ProdigyOptions(ForeachOptions):
    """Options of prodigy."""

    lr: NonNegativeFloat = 1.0
    betas: Betas = (0.9, 0.999)
    beta3: Annotated[float, Field(ge=0, le=1)] | None = None
    d0: float = 1e-6
    d_coef: float = 1.0
    growth_rate: float = Field(float("inf"), allow_inf_nan=True)
    weight_decay: NonNegativeFloat = 0.0
    weight_decouple: bool = True
    fixed_decay: bool = False
    bias_correction: bool = False
    safeguard_warmup: bool = False
    eps: NonNegativeFloat = 1e-8


class ScheduleFreeOptions(ForeachOptions):
    """Options of schedulefree."""

    averages = True
    lr: NonNegativeFloat = 2.5e-3
    betas: tuple[Annotated[float, Field(gt=0, lt=1)], Decay] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    r: float = 0.0
    weight_lr_power: float = 2.0
    warmup_steps: int = 0
    decoupling_c: int = Field(0, ge=0)
    ams_bound: bool = False
    eps: NonNegativeFloat = 1e-8


class SgdSaiOptions(OptimizerOptions):
    """Options of sgdsai."""

    lr: NonNegativeFloat = 1e-2
    momentum: Decay = 0.9
    weight_decay: NonNegativeFloat = 1e-2
    eps: NonNegativeFloat = 1e-8


class MuonOptions(OptimizerOptions):
    """Options of muon."""

    splits_hidden = True
    lr: NonNegativeFloat = 1e-3
    momentum: Decay = 0.95
    weight_decay: NonNegativeFloat = 0.1
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    betas: Betas = (0.9, 0.95)
    eps: NonNegativeFloat = 1e-8


class GaLoreOptions(OptimizerOptions):
    """Options of galore and fira."""

    splits_hidden = True
    lr: NonNegativeFloat = 1e-2
    betas: Betas = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    rank: int = Field(128, ge=1)
    update_proj_gap: int = Field(200, ge=1)
    scale: NonNegativeFloat = 0.25


class ZerothOptions(OptimizerOptions):
    """Options of zo-sgd and zo-sgd-sign.

    Attributes:
        lr: above 0, because ratios of learning rates scale the directions.
    """

    zeroth = True
    lr: float = Field(1e-5, gt=0)


class ForwardGradientOptions(ZerothOptions):
    """Options of forward-gradient."""

    exact = True


class ConservativeOptions(ZerothOptions):
    """Options of zo-sgd-conservative."""

    selects = True


class ZerothMomentumOptions(ZerothOptions):
    """Options of zo-sgd-momentum."""

    momentum: float = 0.9


class ZerothAdamOptions(ZerothOptions):
    """Options of zo-adam."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class HybridOptions(ZerothOptions):
    """Options of zo-hybrid."""

    hybrid = True
    shared = frozenset({"first_order_lr"})
    first_order_lr: float = 1e-3
    betas: Betas = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.01


OPTIMIZER_OPTIONS: dict[str, type[OptimizerOptions]] = {
    "sgd": SgdOptions,
    "adam": AdamOptions,
    "adamw": AdamWOptions,
    "nadam": NAdamOptions,
    "nadamw": NAdamWOptions,
    "radam": RAdamOptions,
    "adagrad": AdagradOptions,
    "rmsprop": RMSpropOptions,
    "adabelief": AdaBeliefOptions,
    "adan": AdanOptions,
    "lamb": LambOptions,
    "lion": LionOptions,
    "prodigy": ProdigyOptions,
    "schedulefree": ScheduleFreeOptions,
    "sgdsai": SgdSaiOptions,
    "muon": MuonOptions,
    "galore": GaLoreOptions,
    "fira": GaLoreOptions,
    "zo-sgd": ZerothOptions,
    "zo-sgd-sign": ZerothOptions,
    "zo-sgd-conservative": ConservativeOptions,
    "zo-sgd-momentum": ZerothMomentumOptions,
    "zo-adam": ZerothAdamOptions,
    "zo-hybrid": HybridOptions,
    "forward-gradient": ForwardGradientOptions,
}
"""Optimizer -> its options, without those of parameter groups; see `optimizer_options`."""


def optimizer_options(name: str) -> type[OptimizerOptions] | None:
    """Return the options of an optimizer in the table; None: it is not in the table."""
    return with_rules(OPTIMIZER_OPTIONS[name]) if name in OPTIMIZER_OPTIONS else None
