"""The rows of federated_quality.py: models and data, methods and the rates that they may have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench import ROOT

from federated.recipe import FederateRecipe
from raytrain.recipe import read_toml
from raytrain.tasks.classify import classify
from raytrain.tasks.digits import digits
from raytrain.tasks.options import ClassifyOptions, DigitsOptions, TextOptions
from raytrain.tasks.task import Task
from raytrain.tasks.text import text

TUNING_SHARE = 10
"""Inverse of the share of training examples, or of speakers, that are kept from clients, for tuning."""
Partitions = Mapping[str, Mapping[str, Any]]
PARTITIONS: Partitions = {
    "iid": {"name": "iid"},
    "dirichlet 0.5": {"name": "dirichlet", "alpha": 0.5},
    "dirichlet 0.1": {"name": "dirichlet", "alpha": 0.1},
}
SPEAKERS: Partitions = {"domain": {"name": "domain"}}
Rates = Sequence[float]


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table.

    Attributes:
        fields: of its recipe.
        rates: what it may have as its learning rate.
        rate: the field that is.
    """

    fields: Mapping[str, Any]
    rates: Rates
    rate: str = "optimizer.lr"


def seeds(name: str, steps: int, rates: Rates, **options: Any) -> Method:
    """Return a method whose clients send numbers along seeds."""
    return Method({"protocol": {"name": name, "local_steps": steps, "pool": 4096, **options}, "strategy": {}}, rates)


def gradients(strategy: str, rates: Rates, rate: str = "optimizer.lr", **more: Any) -> Method:
    """Return a method whose clients send parameters.

    Args:
        strategy: of Flower's.
        rates: that `rate` may have.
        rate: a field of the recipe, or an argument of the strategy.
        more: fields of the recipe, and "arguments" of the strategy.
    """
    fields = {
        "protocol": {"name": "flower", "local_steps": 20},
        "strategy": {"name": strategy, "arguments": more.pop("arguments", {})},
        "optimizer": {"name": "sgd", "lr": 0.1},
        **more,
    }
    return Method(fields, rates, rate)


LOW_RATES, HIGH_RATES = (1e-3, 3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1, 3e-1)
"""Of a step along one direction, and along the mean of many."""
CENTRALISED = "centralised"
BESIDE = (CENTRALISED, "FedAvg", "FedProx", "FedAdam")
"""Methods without seeds, or without clients."""
KSEED = "fedkseed, 20 steps"
DIGITS: dict[str, Method] = {
    "fedkseed, 200 steps": seeds("fedkseed", 200, LOW_RATES),
    KSEED: seeds("fedkseed", 20, LOW_RATES),
    "fedkseed-pro, 200 steps": seeds("fedkseed-pro", 200, LOW_RATES),
    "common-seeds, 20 local steps": seeds("common-seeds", 20, LOW_RATES, local=True),
    "common-seeds, 20 probes": seeds("common-seeds", 20, HIGH_RATES),
    "common-seeds, 1 probe": seeds("common-seeds", 1, LOW_RATES),
    "sign, 20 probes": seeds("sign", 20, HIGH_RATES),
    CENTRALISED: seeds("common-seeds", 10, LOW_RATES),
    "FedAvg": gradients("FedAvg", (0.03, 0.1, 0.3, 1.0)),
    "FedProx": gradients("FedProx", (0.03, 0.1, 0.3, 1.0), arguments={"proximal_mu": 0.1}),
    "FedAdam": gradients("FedAdam", (0.003, 0.01, 0.03, 0.1), "strategy.arguments.eta"),
}
SST2_RATES = (1e-6, 3e-6, 1e-5)
SST2: dict[str, Method] = {
    KSEED: seeds("fedkseed", 20, SST2_RATES),
    "fedkseed-pro, 20 steps": seeds("fedkseed-pro", 20, SST2_RATES),
    "common-seeds, 20 local steps": seeds("common-seeds", 20, SST2_RATES, local=True),
    "common-seeds, 20 probes": seeds("common-seeds", 20, (1e-5, 3e-5, 1e-4)),
    "sign, 20 probes": seeds("sign", 20, (1e-4, 3e-4, 1e-3)),
    CENTRALISED: seeds("common-seeds", 10, SST2_RATES),
    "FedAvg": gradients("FedAvg", (0.01, 0.03, 0.1)),
    "FedAvg, LoRA": gradients("FedAvg", (0.03, 0.1, 0.3), adapter={"name": "lora"}),
    "FedAvg, head": gradients("FedAvg", (0.1, 0.3, 1.0), freeze={"match": ["encoder.*"]}),
    "FedProx": gradients("FedProx", (0.01, 0.03, 0.1), arguments={"proximal_mu": 0.1}),
    "FedAdam": gradients("FedAdam", (1e-4, 3e-4, 1e-3), "strategy.arguments.eta"),
}
SHAKESPEARE: dict[str, Method] = {
    KSEED: seeds("fedkseed", 20, (1e-4, 3e-4, 1e-3)),
    "common-seeds, 20 local steps": seeds("common-seeds", 20, (1e-4, 3e-4, 1e-3), local=True),
    "common-seeds, 20 probes": seeds("common-seeds", 20, (1e-3, 3e-3, 1e-2)),
    "FedAvg": gradients("FedAvg", (1e-3, 3e-3, 1e-2), optimizer={"name": "adamw"}),
}


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one model and data.

    Attributes:
        recipe: shipped, with which they begin.
        tuning: task of choosing a rate.
        metric: that is compared.
        partitions: of its rows.
        methods: of its rows.
        steps: of each of the ten clients of a round, over all rounds.
        tuning_steps: of these where a rate is chosen; 0: the second one is taken.
        points: evaluations of a run, beside that of its start.
        clients: share of the clients that evaluate the model.
        changes: to the recipe.
    """

    recipe: str
    tuning: str
    metric: str
    partitions: Partitions
    methods: Mapping[str, Method]
    steps: int
    tuning_steps: int
    points: int
    clients: float
    changes: Mapping[str, Any] = field(default_factory=dict)


GROUPS: dict[str, Group] = {
    "digits": Group("digits-fedkseed", "tuning_digits", "accuracy", PARTITIONS, DIGITS, 4_000, 1_500, 10, 1.0),
    "sst2": Group("sst2-fedkseed", "tuning_sentences", "accuracy", PARTITIONS, SST2, 400, 60, 4, 0.1),
    "shakespeare": Group(
        "shakespeare-speakers", "tuning_text", "bits_per_byte", SPEAKERS, SHAKESPEARE, 1_000, 200, 5, 0.0
    ),
}
QUICK: dict[str, Mapping[str, Any]] = {
    "digits": {"partitions": {"dirichlet 0.5": PARTITIONS["dirichlet 0.5"]}},
    "sst2": {"partitions": {"iid": PARTITIONS["iid"]}, "steps": 20, "tuning_steps": 0, "points": 1, "clients": 0.01},
    "shakespeare": {"steps": 40, "tuning_steps": 0, "points": 1},
}
START_STEPS, QUICK_START_STEPS = 4_000, 20
"""Of training the GPT that speakers begin with."""
START_MODEL: dict[str, Any] = {
    "tokens": "bytes",
    "model": "gpt",
    "layers": 2,
    "heads": 2,
    "width": 64,
    "block": 64,
    "stride": 64,
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """Some examples of a task.

    Attributes:
        examples: all of them.
        indices: of these.
    """

    examples: Any
    indices: Sequence[int]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        """Return one."""
        return self.examples[self.indices[index]]

    def label(self, index: int) -> int:
        """Return its class."""
        label: int = self.examples.label(self.indices[index])
        return label

    def domain(self, index: int) -> str:
        """Return its source."""
        domain: str = self.examples.domain(self.indices[index])
        return domain


def tuning_digits(options: DigitsOptions) -> Task:
    """Return the task of choosing a rate: a tenth of the training images of `digits` is held out."""
    task = digits(options)
    return _tuning(task, list(range(len(task.data("train")))))


def tuning_sentences(options: ClassifyOptions) -> Task:
    """Return the same for `classify`."""
    task = classify(options)
    return _tuning(task, list(range(len(task.data("train")))))


def tuning_text(options: TextOptions) -> Task:
    """Return the same for `text`: the windows of every tenth speaker are held out."""
    task = text(options)
    train = task.data("train")
    return _tuning(task, [train.label(index) for index in range(len(train))])


def _tuning(task: Task, numbers: Sequence[int]) -> Task:
    """Return a task that holds out training examples whose number is a multiple of ten."""
    train = task.data("train")
    parts: dict[str, list[int]] = {"train": [], "valid": []}
    for index, number in enumerate(numbers):
        parts["train" if number % TUNING_SHARE else "valid"].append(index)
    if task.metric == "bits_per_byte":  # training windows start at every token
        parts["valid"] = parts["valid"][:: START_MODEL["block"]]
    return replace(task, data=lambda split: Chosen(train, parts[split]))


def recipe_of(group: Group, method: str, partition: str, steps: int, rate: float) -> FederateRecipe:
    """Return the recipe of a row, whose task may be replaced."""
    raw, _ = read_toml(str(ROOT / "federated" / "recipes" / f"{group.recipe}.toml"), [])
    found = group.methods[method]
    fields = {**raw, "partition": group.partitions[partition], **found.fields}
    if "optimizer" not in found.fields and raw["optimizer"].get("name", "zo-sgd") != "zo-sgd":
        fields["optimizer"] = {"name": "zo-sgd"}
    fields["rounds"] = steps // fields["protocol"]["local_steps"]
    if method == CENTRALISED:
        fields |= {"rounds": steps, "clients": {"count": 1, "per_round": 1}, "partition": {"name": "iid"}}
    return FederateRecipe.parse_with(fields, {**group.changes, found.rate: rate})
