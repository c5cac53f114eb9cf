"""Synchronisers by name, and the options of each. They load without torch: a recipe is read by them."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from raytrain.recipe import Options, options_parameter
from raytrain.registry import check_known

SYNCHRONISERS: dict[str, str] = {
    "gradients": "raytrain.sync.ddp:gradients",
    "local-sgd": "raytrain.sync.methods:local_sgd",
    "slowmo": "raytrain.sync.methods:slowmo",
    "diloco": "raytrain.sync.methods:diloco",
    "cocod": "raytrain.sync.methods:cocod",
    "late": "raytrain.sync.methods:late",
    "co2": "raytrain.sync.methods:co2",
}

NUMBERS: dict[str, str] = {
    "numbers": "raytrain.sync.scalars:numbers",
    "one-byte": "raytrain.sync.scalars:one_byte",
}
"""What zeroth-order optimizers take in their place."""

ALL_SYNCHRONISERS: dict[str, str] = SYNCHRONISERS | NUMBERS

CODECS: dict[str, str] = {
    "bfloat16": "raytrain.sync.compression:BFloat16",
    "int8": "raytrain.sync.compression:Int8",
}

PENALTIES: dict[str, str] = {
    "none": "raytrain.sync.outer:NoPenalty",
    "constant": "raytrain.sync.outer:Constant",
    "gap-aware": "raytrain.sync.outer:GapAware",
    "secant": "raytrain.sync.outer:Secant",
}


class SyncOptions(Options):
    """Options of every synchroniser.

    Attributes:
        timeout_seconds: how long a worker may show no progress, and an exchange may take, before the attempt ends.
    """

    timeout_seconds: float = Field(300.0, gt=0)


class GradientOptions(SyncOptions):
    """Options of gradient averaging.

    Attributes:
        bucket_bytes: gradients are sent in pieces of about this size, each as soon as the backward pass has filled it;
            0: a sixteenth of the model, between 1 and 25 MiB. Between two workers at 1 Gbit/s, pieces of 1 MiB of a
            model of 13 MB took 0.32 s a step where one piece took 0.37 s (alone: 0.25 s), and on one machine they cost
            nothing.
        shard: whether each worker keeps only its share of the parameters, of the gradients and of the optimizer's
            state, and gathers the parameters block by block to compute (FSDP), in bfloat16 if that is the recipe's
            precision: for models that are too large for one worker, at the price of sending one and a half times as
            much, and that for each micro-batch. The task must call the model as a whole, and equally often on each
            worker. Checkpoints are the same.
    """

    name: str = "gradients"
    bucket_bytes: int = Field(0, ge=0)
    shard: bool = False


class LocalOptions(SyncOptions):
    """Options of local SGD: every so many steps the replicas go on from their mean.

    Attributes:
        every: steps in a round.
        codec: how differences are sent: "bfloat16", "int8", or as they are; what rounding leaves out is sent later.
        buffers: "mean": buffers such as the running means of BatchNorm are averaged too, without rounding; "local":
            each worker keeps its own, and they are averaged at the end.
    """

    name: str = "local-sgd"
    every: int = Field(12, ge=1)
    codec: str | None = None
    buffers: Literal["mean", "local"] = "mean"

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, name: str | None) -> str | None:
        if name is not None:
            check_known(CODECS, name, "sync.codec")
        return name


class MomentumOptions(LocalOptions):
    """Options of an outer step with momentum.

    Attributes:
        rate: of the outer step.
        momentum: of the outer step.
    """

    rate: float = Field(1.0, gt=0)
    momentum: float = Field(0.5, ge=0, lt=1)


class NesterovOptions(MomentumOptions):
    """Options of an outer step with Nesterov's momentum; the defaults are those of DiLoCo."""

    rate: float = Field(0.7, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)


class LateOptions(LocalOptions):
    """Options of the mean that comes late, on top of what was done since.

    Attributes:
        every: steps in a round; "auto": as few as hide the exchange, and keep its processor time below 3 % of theirs.
        delay: steps from sending to applying, at most `every`; "auto": as few as hide the exchange.
        momentum: of the mean of the workers' last steps, the share that each of them adds to its own, in at least
            twelve parts of a round; a movement that lasts is amplified by up to 1 / (1 - momentum). It takes less where
            the optimizer's own momentum is above 0.9.
        pull: how far a replica comes from where it was when it sent to the shared point; default: 1, all the way, at
            once, down to 1/2 a round late.
    """

    every: Annotated[int, Field(ge=1)] | Literal["auto"] = 12  # type: ignore[assignment]
    delay: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    momentum: float = Field(0.7, ge=0, lt=1)
    pull: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.every != "auto" and self.delay != "auto" and self.delay > self.every:
            raise ValueError(f"expected sync.delay of at most sync.every = {self.every}; got {self.delay}")
        return self


class Co2Options(MomentumOptions):
    """Options of CO2 as published.

    Attributes:
        penalty: what a difference is divided by, because it is late: "none", "constant", "gap-aware" or "secant".
        clip: the largest element of the momentum; 0: any.
    """

    momentum: float = Field(0.2, ge=0, lt=1)
    penalty: str = "secant"
    clip: float = Field(1.0, ge=0)

    @field_validator("penalty")
    @classmethod
    def _known_penalty(cls, name: str) -> str:
        check_known(PENALTIES, name, "sync.penalty")
        return name


class NumberOptions(SyncOptions):
    """Options of exchanging numbers.

    Attributes:
        check_every: steps after which workers compare a hash of their parameters, of 8 bytes; 0: never.
        stop_every: steps after which they agree on whether to stop, with one byte each. Nothing else is sent beside the
            slopes, but the weight of each worker's losses where losses have weights.
    """

    check_every: int = Field(100, ge=0)
    stop_every: int = Field(8, ge=1)


def options_of_synchroniser(factory: Any) -> type[Options]:
    """Return the options of a synchroniser of the user's: those that its function declares."""
    return options_parameter(factory, SyncOptions)


OPTIONS: dict[str, type[SyncOptions]] = {
    "gradients": GradientOptions,
    "local-sgd": LocalOptions,
    "slowmo": MomentumOptions,
    "diloco": NesterovOptions,
    "cocod": LocalOptions,
    "late": LateOptions,
    "co2": Co2Options,
    "numbers": NumberOptions,
    "one-byte": NumberOptions,
}
"""Synchroniser -> its options."""
