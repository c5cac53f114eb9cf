"""Synchronisers by name, and the options of each. They load without torch: a recipe is read by them."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from raytrain.recipe import Options, options_parameter
from raytrain.registry import check_known

SYNCHRONISERS: dict[str, str] = {
    "ddp": "raytrain.sync.ddp:ddp Gradient all-reduce in every step, overlapped with the backward pass (DDP).",
    "fsdp": "raytrain.sync.fsdp:fsdp Sharded parameters, gradients and optimizer state (FSDP2, ZeRO stage 3).",
    "local-sgd": "raytrain.sync.methods:local_sgd Local SGD: parameters are averaged every few steps (Stich 2019).",
    "slowmo": "raytrain.sync.methods:slowmo SlowMo: outer momentum, scaled by the learning rate (Wang et al. 2020).",
    "diloco": "raytrain.sync.methods:diloco DiLoCo: outer SGD with Nesterov momentum (Douillard et al. 2023).",
    "cocod": "raytrain.sync.methods:cocod CoCoD-SGD: averaging one round late, local progress kept (Shen et al. 2019).",
    "delayed-averaging": "raytrain.sync.methods:delayed_averaging Averaging some steps late, with global momentum.",
    "co2": "raytrain.sync.methods:co2 CO2: outer momentum one round late, over a staleness penalty (Sun et al. 2024).",
}
"""For optimizers that take gradients."""

SCALAR_EXCHANGES: dict[str, str] = {
    "scalars": "raytrain.sync.scalars:scalars Projected gradients as float32, with seeds that every worker knows.",
    "one-byte": "raytrain.sync.scalars:one_byte Projected gradients in one byte each (Zelikman et al. 2023).",
}
"""For zeroth-order optimizers."""

ALL_SYNCHRONISERS: dict[str, str] = SYNCHRONISERS | SCALAR_EXCHANGES

COMPRESSIONS: dict[str, str] = {
    "bfloat16": "raytrain.sync.compression:BFloat16 Two bytes for each value.",
    "int8": "raytrain.sync.compression:Int8 One byte for each value, and a scale for each block of 1,024.",
}

PENALTIES: dict[str, str] = {
    "none": "raytrain.sync.outer:NoPenalty No penalty.",
    "constant": "raytrain.sync.outer:ConstantPenalty 2 outer_lr / (1 - outer_momentum).",
    "gap-aware": "raytrain.sync.outer:GapAwarePenalty 1 + |last outer step| / |pseudo-gradient|.",
    "secant": "raytrain.sync.outer:SecantPenalty 3 outer_lr c / (1 - outer_momentum), with the curvature c measured.",
}


class SyncOptions(Options):
    """Options of every synchroniser.

    Attributes:
        timeout_seconds: how long a worker may show no progress, and a collective may take, before the attempt ends.
    """

    timeout_seconds: float = Field(300.0, gt=0)


class DdpOptions(SyncOptions):
    """Options of `ddp`.

    Attributes:
        bucket_bytes: size of a gradient bucket, which is all-reduced as soon as the backward pass has filled it;
            0: a sixteenth of the model, between 1 and 25 MiB. Between two workers at 1 Gbit/s, buckets of 1 MiB of a
            model of 13 MB took 0.32 s a step where one bucket took 0.37 s (alone: 0.25 s), and on one machine they
            cost nothing.
    """

    name: str = "ddp"
    bucket_bytes: int = Field(0, ge=0)


class FsdpOptions(SyncOptions):
    """Options of `fsdp`: each worker keeps a shard of the parameters, of the gradients and of the optimizer state.

    Parameters are gathered block by block to compute, in bfloat16 if that is the recipe's precision. This is for models
    that are too large for one worker, and sends one and a half times as much as `ddp`, in each micro-batch. The task
    must call the model as a whole, and equally often on each worker. Checkpoints are the same.
    """

    name: str = "fsdp"


class LocalUpdateOptions(SyncOptions):
    """Options of local SGD, and of every method of local updates.

    Attributes:
        every: local steps in a round.
        compression: of pseudo-gradients, with error feedback: "bfloat16" or "int8"; default: none.
        buffers: "mean": buffers such as the running statistics of BatchNorm are averaged too, without compression;
            "local": each worker keeps its own, and they are averaged at the end.
    """

    name: str = "local-sgd"
    every: int = Field(12, ge=1)
    compression: str | None = None
    buffers: Literal["mean", "local"] = "mean"

    @field_validator("compression")
    @classmethod
    def _known_compression(cls, name: str | None) -> str | None:
        if name is not None:
            check_known(COMPRESSIONS, name, "sync.compression")
        return name


class OuterMomentumOptions(LocalUpdateOptions):
    """Options of an outer optimizer with momentum.

    Attributes:
        outer_lr: learning rate of the outer step.
        outer_momentum: momentum of the outer step.
    """

    outer_lr: float = Field(1.0, gt=0)
    outer_momentum: float = Field(0.5, ge=0, lt=1)


class NesterovOptions(OuterMomentumOptions):
    """Options of an outer optimizer with Nesterov momentum; the defaults are those of DiLoCo."""

    outer_lr: float = Field(0.7, gt=0)
    outer_momentum: float = Field(0.9, ge=0, lt=1)


class DelayedAveragingOptions(LocalUpdateOptions):
    """Options of `delayed-averaging`.

    Attributes:
        every: local steps in a round; "auto": the shortest round that hides the all-reduce behind computation, and
            keeps the all-reduce's processor time below 3 %.
        delay: steps from sending a pseudo-gradient to applying the average, at most `every`; "auto": as few as hide the
            all-reduce.
        global_momentum: coefficient of the global momentum that each worker adds to its local steps, in at least twelve
            slices of a round. A lasting direction is amplified by up to 1 / (1 - global_momentum). Lower it where the
            optimizer's own momentum is above 0.9.
        alpha: weight with which a worker is interpolated toward the anchor when the average arrives; default:
            1 - (delay / every)^2 / 2.
    """

    every: Annotated[int, Field(ge=1)] | Literal["auto"] = 12  # type: ignore[assignment]
    delay: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    global_momentum: float = Field(0.7, ge=0, lt=1)
    alpha: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.every != "auto" and self.delay != "auto" and self.delay > self.every:
            raise ValueError(f"expected sync.delay of at most sync.every = {self.every}; got {self.delay}")
        return self


class Co2Options(OuterMomentumOptions):
    """Options of CO2 as published.

    Attributes:
        penalty: staleness penalty, which divides a pseudo-gradient: "none", "constant", "gap-aware" or "secant".
        clip: largest absolute value in the outer momentum; 0: no clipping.
    """

    outer_momentum: float = Field(0.2, ge=0, lt=1)
    penalty: str = "secant"
    clip: float = Field(1.0, ge=0)

    @field_validator("penalty")
    @classmethod
    def _known_penalty(cls, name: str) -> str:
        check_known(PENALTIES, name, "sync.penalty")
        return name


class ScalarOptions(SyncOptions):
    """Options of exchanging projected gradients.

    Attributes:
        check_every: steps between comparisons of a hash of the workers' parameters, of 8 bytes; 0: never.
        stop_every: steps between agreements on whether to stop, of one byte each. Nothing else is sent beside the
            projected gradients, but the weight of each worker's losses where losses have weights.
    """

    check_every: int = Field(100, ge=0)
    stop_every: int = Field(8, ge=1)


def options_of_synchroniser(factory: Any) -> type[Options]:
    """Return the options class that a user's synchroniser factory declares."""
    return options_parameter(factory, SyncOptions)


SYNC_OPTIONS: dict[str, type[SyncOptions]] = {
    "ddp": DdpOptions,
    "fsdp": FsdpOptions,
    "local-sgd": LocalUpdateOptions,
    "slowmo": OuterMomentumOptions,
    "diloco": NesterovOptions,
    "cocod": LocalUpdateOptions,
    "delayed-averaging": DelayedAveragingOptions,
    "co2": Co2Options,
    "scalars": ScalarOptions,
    "one-byte": ScalarOptions,
}
"""Synchroniser -> its options."""
