"""Options of what a federated run is made of, beside its protocol. They load without torch and NumPy."""

from typing import Literal

from pydantic import Field

from raytrain.recipe import Options, Section


class PartitionOptions(Options):
    """Options of every partition.

    Attributes:
        sizes: how the numbers of examples differ: "equal", "zipf" or "lognormal".
        spread: of these: the exponent of "zipf", or the standard deviation of the logarithm.
        minimum: examples of a client.
        size: mean number of examples that a client draws where there are more clients than examples.
    """

    sizes: Literal["equal", "zipf", "lognormal"] = "equal"
    spread: float = Field(1.0, gt=0, le=5)
    minimum: int = Field(1, ge=1)
    size: int = Field(20, ge=1)


class DirichletOptions(PartitionOptions):
    """Options of `dirichlet`.

    Attributes:
        alpha: concentration: with 0.1 most clients have one or two labels, with 100 all have all alike.
    """

    alpha: float = Field(0.5, gt=0)


class ShardsOptions(PartitionOptions):
    """Options of `shards`.

    Attributes:
        labels: shards of each client, of which each has one label, or two neighbouring ones.
    """

    labels: int = Field(2, ge=1)


PARTITION_OPTIONS: dict[str, type[PartitionOptions]] = {
    "iid": PartitionOptions,
    "dirichlet": DirichletOptions,
    "shards": ShardsOptions,
    "domain": PartitionOptions,
}
"""Partition -> its options."""


class ProbeOptions(Section):
    """How clients probe a loss.

    Attributes:
        eps: length of a perturbation, of each parameter.
        outlier_threshold: drop projected gradients larger than this many robust standard deviations of those of the
            client in this round; 0 keeps all.
        train_mode: whether the model is in training mode, with dropout.
        objective: a value that the task measures, to be raised in place of lowering the loss; with a minus, lowered.
    """

    eps: float = Field(1e-3, gt=0)
    outlier_threshold: float = Field(10.0, ge=0)
    train_mode: bool = False
    objective: str = ""


class ReportLimits(Section):
    """What a client's report may say.

    Attributes:
        examples: of a client, at most, so that none owns the mean by its own word.
        largest: magnitude of a number.
    """

    examples: int = Field(100_000, ge=1, lt=2**32)
    largest: float = Field(1e6, gt=0)


class Faults(Section):
    """Faults of a run, and when a round goes on without those who have not answered.

    Attributes:
        drop: probability that a client never answers in a round.
        slow: probability that it answers late.
        slow_seconds: how late.
        crash: probability that its process dies.
        garble: probability that its report is damaged.
        timeout_seconds: after which a round ends; 0: it waits for all.
        quorum: clients that have to be heard, or the round moves nothing.
    """

    drop: float = Field(0.0, ge=0, le=1)
    slow: float = Field(0.0, ge=0, le=1)
    slow_seconds: float = Field(60.0, ge=0)
    crash: float = Field(0.0, ge=0, le=1)
    garble: float = Field(0.0, ge=0, le=1)
    timeout_seconds: float = Field(0.0, ge=0)
    quorum: int = Field(1, ge=1)
