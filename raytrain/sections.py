"""Sections of a recipe that every kind of run can have."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from raytrain.recipe import Section
from raytrain.run.loggers import check_logger


class Evaluation(Section):
    """When to evaluate, always on the whole held-out split.

    Attributes:
        every: steps between evaluations; 0: at the end only.
        batch: examples at a time on each worker.
        patience: evaluations without a better metric after which training stops early; 0: never.
    """

    every: int = Field(200, ge=0)
    batch: int = Field(256, ge=1)
    patience: int = Field(0, ge=0)


class Checkpoint(Section):
    """When to save.

    Attributes:
        every: steps between checkpoints; 0: at the end only. The best evaluation is always saved.
        keep: how many of the newest stay, beside the best.
    """

    every: int = Field(200, ge=0)
    keep: int = Field(2, ge=1)


class Resources(Section):
    """What each worker gets.

    Attributes:
        cpus: processors, which are also its threads; 0: an equal share of the machine's.
        gpus: GPUs; above 0, the worker computes on one.
        custom: what else, by the names and amounts that machines were given by `ray start --resources`.
        labels: on which machines, by labels that Ray gives ("ray.io/accelerator-type") or `ray start --labels` gave:
            a value, "!value", "in(one, other)" or "!in(one, other)".
        placement: how Ray spreads workers over machines.
    """

    cpus: float = Field(0, ge=0)
    gpus: float = Field(0, ge=0)
    custom: dict[str, Annotated[float, Field(gt=0)]] = {}
    labels: dict[str, Annotated[str, Field(pattern=r"^!?([\w.-]+|in\([\w., -]+\))$")]] = {}
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"

    def extra_resources(self) -> dict[str, float]:
        """Return what each worker takes beside processors, by Ray's names."""
        return {**({"GPU": self.gpus} if self.gpus else {}), **self.custom}

    @field_validator("custom")
    @classmethod
    def _others(cls, custom: dict[str, float]) -> dict[str, float]:
        for name in custom.keys() & {"CPU", "GPU", "TPU"}:
            raise ValueError(f"expected names of custom resources, and {name} is none; see resources.cpus and gpus")
        return custom


class Logging(Section):
    """Metrics and loggers.

    Attributes:
        every: steps between lines of metrics.jsonl.
        loggers: what else takes these lines.
    """

    every: int = Field(10, ge=1)
    loggers: tuple[str, ...] = ("tensorboard",)

    @field_validator("loggers")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            check_logger(name)
        return names
