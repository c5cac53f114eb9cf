"""The recipe of a federated run."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator
from pydantic_core import PydanticCustomError

from federated.options import PARTITION_OPTIONS, Faults, PartitionOptions, ProbeOptions, ReportLimits
from federated.protocols.options import (
    MOST_CLIENTS,
    MOST_ROUNDS,
    PROTOCOL_OPTIONS,
    LocalOptions,
    ProtocolOptions,
)
from federated.tables import PARTITIONS, PROTOCOLS, STRATEGIES
from raytrain.optim.arguments import optimizer_options
from raytrain.optim.options import ALL_OPTIMIZERS, OPTIMIZERS, OptimizerOptions
from raytrain.optim.schedules import SCHEDULES, lr_factor
from raytrain.recipe import AbsolutePath, Recipe, Section, options_by_name, options_parameter
from raytrain.registry import resolve, suggest
from raytrain.training.recipe import AdapterField, Freeze, Schedule, TaskField, options_of_optimizer

ELSEWHERE = {
    "workers": "clients.actors",
    "steps": "rounds and protocol.local_steps",
    "batch": "protocol.batch",
    "accumulate": "protocol.batch",
    "sync": "protocol",
}
"""Fields of a training recipe, and where a federated one says the same."""

LEAST_LEFT = 1e-30
"""Of a step after all decays: coefficients are kept over this factor, and float32 ends at 3e38."""


def options_of_protocol(protocol: Any) -> type[LocalOptions]:
    """Return the options of a protocol: the annotation of its constructor's parameter."""
    options: Any = options_parameter(protocol.__init__, LocalOptions)
    found: type[LocalOptions] = options
    return found


def options_of_partition(partition: Any) -> type[PartitionOptions]:
    """Return the options of a partition: the annotation of its parameter."""
    options: Any = options_parameter(partition, PartitionOptions)
    found: type[PartitionOptions] = options
    return found


ProtocolField = Annotated[
    SerializeAsAny[LocalOptions],
    options_by_name(PROTOCOLS, "protocol", options_of_protocol, "fedkseed", known=PROTOCOL_OPTIONS.get),
]
PartitionField = Annotated[
    SerializeAsAny[PartitionOptions],
    options_by_name(PARTITIONS, "partition", options_of_partition, "iid", known=PARTITION_OPTIONS.get),
]
ClientOptimizerField = Annotated[
    SerializeAsAny[OptimizerOptions],
    options_by_name(ALL_OPTIMIZERS, "optimizer", options_of_optimizer, "zo-sgd", known=optimizer_options),
]


class Clients(Section):
    """Who takes part, and on what.

    Attributes:
        count: clients that are registered; 0: as many as the partition has domains.
        per_round: of these, drawn for each round.
        actors: processes that serve them; 0: as many as there are free CPUs, and at most two for each GPU.
        cpus: of each process, which are also its threads.
        gpus: of each process.
    """

    count: int = Field(100, ge=0, lt=2**32)
    per_round: int = Field(10, ge=1, le=MOST_CLIENTS)
    actors: int = Field(0, ge=0)
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)


class ZeroOrder(ProbeOptions):
    """How clients perturb the model, see also `ProbeOptions`.

    Attributes:
        distribution: of a direction's numbers: "rademacher" or "gaussian".
        sparsity: share of each matrix, its elements of largest magnitude in w0, that stands still.
    """

    distribution: Literal["rademacher", "gaussian"] = "rademacher"
    sparsity: float = Field(0.0, ge=0, lt=1)


class FederatedEvaluation(Section):
    """When to evaluate.

    Attributes:
        every: rounds between evaluations of the model on the task's held-out examples; 0: at the end only.
        batch: examples at a time.
        clients: share of the clients that evaluate it on their own examples then.
    """

    every: int = Field(5, ge=0)
    batch: int = Field(256, ge=1)
    clients: float = Field(0.0, ge=0, le=1)


class Strategy(Section):
    """A strategy of Flower's.

    Attributes:
        name: of STRATEGIES; "": none.
        arguments: of its constructor.
    """

    name: str = Field("", examples=list(STRATEGIES))
    arguments: Mapping[str, float | int | bool | str] = {}

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name and name not in STRATEGIES:
            raise ValueError(f"no such strategy {name!r}; {suggest(name, STRATEGIES)}")
        return name


class FederateRecipe(Recipe):
    """How to fine-tune a model with clients that keep their data.

    >>> FederateRecipe.parse({"kind": "federate", "task": "digits", "protocol": "sign"}).protocol.local_steps
    200

    Attributes:
        rounds: communication rounds.
        start: folder of a run, as of `raytrain train`, whose best model the clients begin with; None: the task's own.
        limits: what a client's report may say.
    """

    kind: Literal["federate"] = "federate"
    rounds: int = Field(40, ge=1, le=MOST_ROUNDS)
    task: TaskField
    start: AbsolutePath | None = None
    adapter: AdapterField = Field(default={}, validate_default=True)
    freeze: Freeze = Freeze()
    clients: Clients = Clients()
    partition: PartitionField = Field(default={}, validate_default=True)
    protocol: ProtocolField = Field(default={}, validate_default=True)
    strategy: Strategy = Strategy()
    optimizer: ClientOptimizerField = Field(default={}, validate_default=True)
    schedule: Schedule = Schedule(name="constant")
    zo: ZeroOrder = ZeroOrder()
    evaluation: FederatedEvaluation = FederatedEvaluation()
    faults: Faults = Faults()
    limits: ReportLimits = ReportLimits()

    @model_validator(mode="before")
    @classmethod
    def _name_what_is_elsewhere(cls, raw: Any) -> Any:
        for name in ELSEWHERE.keys() & raw.keys() if isinstance(raw, Mapping) else ():
            known = f"a federated recipe says {ELSEWHERE[name]}"
            raise PydanticCustomError("unknown_field", "no such field; {known}", {"field": name, "known": known})
        return raw

    @model_validator(mode="after")
    def _fit(self) -> Self:
        clients, quorum = self.clients, self.faults.quorum
        if self.freeze.random_half:
            raise ValueError("freeze.random_half: expected false: no client of a federated run freezes other layers")
        if self.optimizer.gradient_noise:
            raise ValueError(
                f"optimizer.gradient_noise: expected 0: clients of a federated run add none; "
                f"got {self.optimizer.gradient_noise:g}"
            )
        if self.clients.count and clients.per_round > clients.count:
            raise ValueError(
                f"clients.per_round: expected at most clients.count = {clients.count}; got {clients.per_round}"
            )
        if quorum > clients.per_round:
            raise ValueError(f"faults.quorum: expected at most clients.per_round = {clients.per_round}; got {quorum}")
        if not clients.count and self.partition.name != "domain":
            raise ValueError(f"clients.count: expected 1 or more with partition {self.partition.name}; got 0")
        if isinstance(self.protocol, ProtocolOptions):
            self._check_seeds(self.protocol)
        else:
            self._check_gradients()
        return self

    def _check_seeds(self, protocol: ProtocolOptions) -> None:
        """Refuse what does not go with clients that send numbers along seeds."""
        if self.strategy.name:
            raise ValueError(
                f"strategy.name: {self.strategy.name} averages arrays of parameters, and clients of "
                f"{protocol.name} send numbers; leave it out"
            )
        if self.optimizer.name != "zo-sgd":
            raise ValueError(
                f"optimizer.name: expected zo-sgd with {protocol.name}, whose steps the server repeats as a sum; "
                f"got {self.optimizer.name}"
            )
        lr = self.optimizer.arguments()["lr"]
        if not lr * protocol.weight_decay < 1:
            raise ValueError(
                f"protocol.weight_decay: expected below 1 / optimizer.lr = {1 / lr:g}; got {protocol.weight_decay:g}"
            )
        left = math.prod(1 - rate * protocol.weight_decay for rate in self.learning_rates())
        if left < LEAST_LEFT:
            raise ValueError(
                f"protocol.weight_decay: expected to leave at least {LEAST_LEFT:g} of the first round's step after "
                f"{self.rounds} rounds; {protocol.weight_decay:g} leaves {left:g}"
            )

    def _check_gradients(self) -> None:
        """Refuse what does not go with clients that send parameters."""
        if not self.strategy.name:
            raise ValueError(f"strategy.name: required with protocol {self.protocol.name}; {suggest('', STRATEGIES)}")
        if self.optimizer.name not in OPTIMIZERS:
            raise ValueError(
                f"optimizer.name: expected one with gradients, as sgd, with protocol {self.protocol.name}; "
                f"got {self.optimizer.name}"
            )
        if self.faults.garble:
            raise ValueError(
                f"faults.garble: expected 0 with protocol {self.protocol.name}, whose arrays have no seal; "
                f"got {self.faults.garble:g}"
            )

    @property
    def seeded(self) -> bool:
        """Whether clients send numbers along seeds, and not parameters."""
        return isinstance(self.protocol, ProtocolOptions)

    def threads(self) -> int:
        """Return the threads of each process of a run, on which its sums depend to the bit."""
        return max(1, int(self.clients.cpus))

    def device(self) -> str:
        """Return where clients compute."""
        return "cuda" if self.clients.gpus else "cpu"

    def learning_rates(self) -> list[float]:
        """Return the learning rate of each round."""
        schedule = self.schedule
        shape = resolve(SCHEDULES, schedule.name, "schedule.name")
        factor = partial(
            lr_factor,
            shape,
            steps=self.rounds,
            warmup=schedule.warmup,
            min_lr_ratio=schedule.min_lr_ratio,
            decay_ratio=schedule.decay_ratio,
        )
        return [self.optimizer.arguments()["lr"] * factor(number) for number in range(self.rounds)]
