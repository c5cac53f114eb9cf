"""What federated methods reach, and for how many bytes, where clients are alike and where they are not.

    python tests/benchmark/federated_quality.py             # five seeds: an hour and a half of one core
    python tests/benchmark/federated_quality.py --quick     # one seed of Dirichlet 0.5: 9 minutes

Handwritten digits, a network of 2,410 parameters from random weights, 100 clients of which 10 take part in a round, IID
and Dirichlet 0.5 and 0.1. In all rows a client takes the same number of steps over all rounds, of two forward passes or
of a gradient; "centralised" has one client with all of the data and ten directions a step, so as many forward passes.

Each method's learning rate is the best of four, on each partition, by the loss on a tenth of the training images that
no client has; these runs are three eighths as long. Rows are measured with all training images at the clients, on the
images that are held out. All is done in this process, which gives what `raytrain federate` does, to the bit.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from bench import RESULTS, ROOT, finish, parse, parser_of

from federated.broadcast import payload_bytes
from federated.build import Federation, protocol_of
from federated.flower.channel import GridMessenger
from federated.flower.identity import FIRST_NODE, assume_identity
from federated.flower.strategy_run import StrategyRun, load_gradient_clients
from federated.flower.testing import InProcessGrid
from federated.recipe import FederateRecipe
from federated.server import CommunicationRound
from raytrain.recipe import read_toml
from raytrain.tasks.digits import DigitExamples, digits
from raytrain.tasks.options import DigitsOptions
from raytrain.tasks.task import Task

STEPS = 4_000
"""Local steps of each of the ten clients of a round, over all rounds."""
TUNING_STEPS = 1_500
SEEDS = 5
TUNING_SHARE = 10
"""Inverse of the share of training images that are kept from clients, for tuning."""
CURVE_POINTS = 10
TUNING_TASK = f"{Path(__file__).stem}:tuning_digits"
PARTITIONS: dict[str, dict[str, Any]] = {
    "iid": {"name": "iid"},
    "dirichlet 0.5": {"name": "dirichlet", "alpha": 0.5},
    "dirichlet 0.1": {"name": "dirichlet", "alpha": 0.1},
}


Rates = tuple[float, float, float, float]


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
    return Method({"protocol": {"name": name, "local_steps": steps, "pool": 4096, **options}}, rates)


def gradients(strategy: str, rates: Rates, rate: str = "optimizer.lr", **arguments: float) -> Method:
    """Return a method whose clients send parameters."""
    fields = {
        "protocol": {"name": "flower", "local_steps": 20},
        "strategy": {"name": strategy, "arguments": arguments},
        "optimizer": {"name": "sgd", "lr": 0.1},
    }
    return Method(fields, rates, rate)


LOW_RATES, HIGH_RATES = (1e-3, 3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1, 3e-1)
"""Of a step along one direction, and along the mean of many."""
CENTRALISED = "centralised"
BESIDE = (CENTRALISED, "FedAvg", "FedProx", "FedAdam")
"""Methods without seeds, or without clients."""
METHODS: dict[str, Method] = {
    "fedkseed, 200 steps": seeds("fedkseed", 200, LOW_RATES),
    "fedkseed, 20 steps": seeds("fedkseed", 20, LOW_RATES),
    "fedkseed-pro, 200 steps": seeds("fedkseed-pro", 200, LOW_RATES),
    "common-seeds, 20 local steps": seeds("common-seeds", 20, LOW_RATES, local=True),
    "common-seeds, 20 probes": seeds("common-seeds", 20, HIGH_RATES),
    "common-seeds, 1 probe": seeds("common-seeds", 1, LOW_RATES),
    "sign, 20 probes": seeds("sign", 20, HIGH_RATES),
    CENTRALISED: seeds("common-seeds", 10, LOW_RATES),
    "FedAvg": gradients("FedAvg", (0.03, 0.1, 0.3, 1.0)),
    "FedProx": gradients("FedProx", (0.03, 0.1, 0.3, 1.0), proximal_mu=0.1),
    "FedAdam": gradients("FedAdam", (0.003, 0.01, 0.03, 0.1), "strategy.arguments.eta"),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        metrics: of its last model.
        curve: (megabytes of all messages until then, accuracy), at each evaluation.
        client_round_bytes: of a message and its answer.
        seconds: it took.
    """

    metrics: Mapping[str, float]
    curve: list[list[float]]
    client_round_bytes: float
    seconds: float


def tuning_digits(options: DigitsOptions) -> Task:
    """Return the task of choosing a rate: a tenth of the training images of `digits` is held out."""
    task = digits(options)
    train = task.data("train")
    images, labels = (torch.stack([train[index][place] for index in range(len(train))]) for place in (0, 1))
    ours = torch.arange(len(train)) % TUNING_SHARE == 0

    def data(split: Literal["train", "valid"]) -> DigitExamples:
        chosen = ours if split == "valid" else ~ours
        return DigitExamples(images[chosen], labels[chosen])

    return replace(task, data=data)


def recipe_of(method: str, partition: str, steps: int, rate: float) -> FederateRecipe:
    """Return the recipe of a row, whose task may be replaced."""
    raw, _ = read_toml(str(ROOT / "federated" / "recipes" / "digits-fedkseed.toml"), [])
    fields = {**raw, "partition": PARTITIONS[partition], **METHODS[method].fields}
    fields["rounds"] = steps // fields["protocol"]["local_steps"]
    if method == CENTRALISED:
        fields |= {"rounds": steps, "clients": {"count": 1, "per_round": 1}, "partition": {"name": "iid"}}
    return FederateRecipe.parse_with(fields, {METHODS[method].rate: rate})


def start(recipe: FederateRecipe) -> tuple[Callable[[], CommunicationRound], Callable[[], dict[str, float]]]:
    """Return what plays a run's next round, and what evaluates its model."""
    if recipe.seeded:
        federation = Federation.of(recipe)
        server = federation.server()
        return federation.simulation(server).play_round, partial(federation.evaluate, server)
    run, grid = StrategyRun(recipe), InProcessGrid(load_gradient_clients(recipe.to_dict()))
    messenger = GridMessenger(grid, range(FIRST_NODE, FIRST_NODE + recipe.clients.count))
    return partial(run.play_round, messenger), run.evaluate


def play(recipe: FederateRecipe) -> Outcome:
    """Play a run to its end."""
    began, (play_round, evaluate) = time.perf_counter(), start(recipe)
    curve, sent, messages = [[0.0, evaluate()["accuracy"]]], 0, 0
    for number in range(1, recipe.rounds + 1):
        done = play_round()
        sent += done.bytes_down + done.bytes_up
        messages += len(done.heard)
        if number * CURVE_POINTS // recipe.rounds > (number - 1) * CURVE_POINTS // recipe.rounds:
            metrics = evaluate()
            curve.append([sent / 1e6, metrics["accuracy"]])
    each = sum(payload_bytes(protocol_of(recipe), recipe.clients.per_round, 10)) if recipe.seeded else sent / messages
    return Outcome(metrics, curve, each, time.perf_counter() - began)


def tuned_rate(method: str, partition: str) -> float:
    """Return the rate with the lowest loss on images that no client has."""
    losses = {}
    for rate in METHODS[method].rates:
        recipe = recipe_of(method, partition, TUNING_STEPS, rate).with_overrides({"task.name": TUNING_TASK, "seed": 0})
        outcome = play(recipe)
        losses[rate] = outcome.metrics["loss"]
        print(f"    {method}, {partition}, rate {rate:g}: {outcome.metrics}, {outcome.seconds:.1f} s", flush=True)
    return min(losses, key=losses.__getitem__)


def row_of(method: str, partition: str, count: int) -> dict[str, Any]:
    """Return a row of the table, the means over its seeds."""
    rate = tuned_rate(method, partition)
    recipe = recipe_of(method, partition, STEPS, rate).with_overrides({"evaluation.clients": 1.0})
    outcomes = [play(recipe.with_overrides({"seed": seed})) for seed in range(1, count + 1)]
    accuracies = [outcome.metrics["accuracy"] for outcome in outcomes]

    def mean(name: str) -> float:
        return statistics.mean(outcome.metrics[name] for outcome in outcomes)

    return {
        "partition": partition,
        "method": method,
        "rate": rate,
        "accuracy": mean("accuracy"),
        "accuracy_range": max(accuracies) - min(accuracies),
        "clients": mean("clients"),
        "worst_tenth": mean("worst_tenth"),
        "rounds": recipe.rounds,
        "client_round_bytes": outcomes[0].client_round_bytes,
        "megabytes": outcomes[0].curve[-1][0],
        "seconds": statistics.median(outcome.seconds for outcome in outcomes),
        "seeds": count,
        "curve": outcomes[0].curve,
    }


def headline_of(table: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures that are wanted, of the partitions that were measured."""
    found = {(row["partition"], row["method"]): row["accuracy"] for row in table}
    wanted = {
        "digits_kseed_iid": ("iid", ["fedkseed, 200 steps", "fedkseed, 20 steps"]),
        "digits_centralised": ("iid", [CENTRALISED]),
        "digits_best_seeds_dirichlet01": ("dirichlet 0.1", [name for name in METHODS if name not in BESIDE]),
        "digits_fedavg_dirichlet01": ("dirichlet 0.1", ["FedAvg"]),
        "digits_best_seeds_dirichlet05": ("dirichlet 0.5", [name for name in METHODS if name not in BESIDE]),
        "digits_fedavg_dirichlet05": ("dirichlet 0.5", ["FedAvg"]),
    }
    return {
        name: max(found[partition, method] for method in methods)
        for name, (partition, methods) in wanted.items()
        if (partition, methods[0]) in found
    }


def plot(table: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw accuracy over the bytes of all messages, for each partition."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    measured = [name for name in PARTITIONS if any(row["partition"] == name for row in table)]
    figure, places = pyplot.subplots(1, len(measured), figsize=(2.2 + 4.2 * len(measured), 4.4), squeeze=False)
    for place, partition in zip(places[0], measured, strict=True):
        for number, method in enumerate(name for name in METHODS if name != CENTRALISED):
            style = {"color": f"C{number}", "linestyle": ":" if method in BESIDE else "-"}
            for row in table:
                if (row["partition"], row["method"]) == (partition, method):
                    megabytes, accuracies = zip(*row["curve"][1:], strict=True)
                    place.plot(megabytes, accuracies, marker="o", markersize=3, label=method, **style)
        for row in table:
            if row["method"] == CENTRALISED:
                place.axhline(row["accuracy"], color="black", linewidth=0.8, label="centralised, no messages")
        place.set(xscale="log", xlabel="MB, both ways, all clients", title=partition, ylim=(0, 1))
        place.grid(alpha=0.3)
    places[0][0].set_ylabel("accuracy on held-out digits")
    figure.legend(*places[0][0].get_legend_handles_labels(), fontsize=8, loc="center right")
    figure.tight_layout(rect=(0, 0, 1 - 2.3 / figure.get_figwidth(), 1))
    figure.savefig(file)


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each row")
    parser.add_argument("--partition", choices=PARTITIONS, action="append", help="measure these rows and keep others")
    parser.add_argument("--method", choices=METHODS, action="append", help="likewise")
    options = parse(parser)
    if options.quick:
        options.seeds, options.partition = 1, options.partition or ["dirichlet 0.5"]
    file = options.json or RESULTS / f"federated_quality{'-quick' if options.quick else ''}.json"
    before = json.loads(file.read_text())["rows"] if file.is_file() else []
    table = {(row["partition"], row["method"]): row for row in before}
    torch.set_num_threads(1)
    assume_identity(run_id=1)
    for partition in options.partition or PARTITIONS:
        for method in options.method or METHODS:
            if method != CENTRALISED or partition == "iid":
                row = table[partition, method] = row_of(method, partition, options.seeds)
                print({name: value for name, value in row.items() if name != "curve"}, flush=True)
    keys = [(partition, method) for partition in PARTITIONS for method in METHODS]
    rows = [table[key] for key in keys if key in table]
    finish("federated_quality", rows, headline_of(rows), options)
    plot(rows, file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
