"""What federated methods reach, and for how many bytes, where clients are alike and where they are not.

    python tests/benchmark/federated_quality.py

Handwritten digits, a network of 2,410 parameters from random weights, 100 clients of which 10 take part in a round, IID
and Dirichlet 0.5 and 0.1. Zeroth-order rows all make the same number of forward passes; "centralised" has one client
with all of the data and ten directions a step. Each row is `raytrain federate` on the actors of one cluster. Learning
rates: of `fedkseed` that of its recipe; of 20 probes and of "centralised" the best of three, tried at 1,600 steps on
Dirichlet 0.5 with seed 0, which no row has; of one probe as of "centralised"; with gradients that of `digits-fedavg`.
"""

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import ROOT, arguments, finish

from federated.broadcast import payload_bytes
from federated.build import protocol_of
from federated.launch.run import run
from federated.recipe import FederateRecipe
from raytrain.kinds import Order
from raytrain.launch.session import session
from raytrain.recipe import read_toml

STEPS = 4_000
"""Local steps of each client in a round, over all rounds."""
PARTITIONS: dict[str, dict[str, Any]] = {
    "iid": {"partition": {"name": "iid"}},
    "dirichlet 0.5": {"partition": {"name": "dirichlet", "alpha": 0.5}},
    "dirichlet 0.1": {"partition": {"name": "dirichlet", "alpha": 0.1}},
}


def seeds(name: str, steps: int, lr: float, **options: Any) -> dict[str, Any]:
    """Return the fields of a zeroth-order row."""
    return {"protocol": {"name": name, "local_steps": steps, "pool": 4096, **options}, "optimizer": {"lr": lr}}


def gradients(strategy: str, **arguments: float) -> dict[str, Any]:
    """Return the fields of a row with gradients."""
    return {
        "protocol": {"name": "flower", "local_steps": 20},
        "strategy": {"name": strategy, "arguments": arguments},
        "optimizer": {"name": "sgd", "lr": 0.05},
    }


METHODS: dict[str, dict[str, Any]] = {
    "fedkseed, 200 steps": seeds("fedkseed", 200, 3e-3),
    "fedkseed, 20 steps": seeds("fedkseed", 20, 3e-3),
    "fedkseed-pro, 200 steps": seeds("fedkseed-pro", 200, 3e-3),
    "common-seeds, 20 probes": seeds("common-seeds", 20, 1e-1),
    "common-seeds, 1 probe": seeds("common-seeds", 1, 1e-2),
    "sign, 20 probes": seeds("sign", 20, 3e-2),
    "centralised": seeds("common-seeds", 10, 1e-2) | {"clients": {"count": 1, "per_round": 1}},
    "FedAvg": gradients("FedAvg"),
    "FedProx": gradients("FedProx", proximal_mu=0.1),
    "FedAdam": gradients("FedAdam", eta=0.01),
}
QUICK = ("fedkseed, 200 steps", "fedkseed, 20 steps", "common-seeds, 20 probes", "sign, 20 probes", "FedAvg")


def recipe_of(method: str, partition: str, seed: int, steps: int) -> FederateRecipe:
    """Return the recipe of a row."""
    raw, _ = read_toml(str(ROOT / "federated" / "recipes" / "digits-fedkseed.toml"), [])
    fields = {**raw, **PARTITIONS[partition], **METHODS[method], "seed": seed}
    rounds = steps if method == "centralised" else steps // fields["protocol"]["local_steps"]
    clients = {"actors": 2, **raw["clients"], **METHODS[method].get("clients", {})}
    if method == "centralised":
        fields["partition"] = {"name": "iid"}
    return FederateRecipe.parse(
        {**fields, "rounds": rounds, "clients": clients, "evaluation": {"every": 0, "clients": 1.0}}
    )


def measure(recipe: FederateRecipe) -> dict[str, float]:
    """Return what a run ends with."""
    with tempfile.TemporaryDirectory() as folder:
        result = run(recipe, Order(Path(folder) / "run"))
    figures = result.figures
    return {
        "accuracy": result.metrics["accuracy"],
        "clients": result.metrics["clients"],
        "worst_tenth": result.metrics["worst_tenth"],
        "rounds": recipe.rounds,
        "client_round_bytes": round_bytes(recipe, figures),
        "megabytes": (figures["bytes_down"] + figures["bytes_up"]) / 1e6,
        "seconds": result.seconds,
    }


def round_bytes(recipe: FederateRecipe, figures: Mapping[str, float]) -> float:
    """Return the bytes of a client that takes part in every tenth round, in one of these, both ways."""
    if recipe.seeded:
        return sum(payload_bytes(protocol_of(recipe), recipe.clients.per_round, 10))
    return (figures["bytes_down"] + figures["bytes_up"]) / figures["heard"]


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table, each the medians over its seeds."""
    for partition in ["dirichlet 0.5"] if quick else PARTITIONS:
        for method in QUICK if quick else METHODS:
            steps = STEPS // 5 if quick else STEPS
            found = [measure(recipe_of(method, partition, seed, steps)) for seed in range(1, 2 if quick else 6)]
            medians = {name: statistics.median(each[name] for each in found) for name in found[0]}
            spread = max(each["accuracy"] for each in found) - min(each["accuracy"] for each in found)
            yield {"partition": partition, "method": method, **medians, "accuracy_range": spread, "seeds": len(found)}


def headline_of(table: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures that are wanted."""
    last = {row["method"]: row for row in table}
    seeded, averaged = last["fedkseed, 20 steps"], last["FedAvg"]
    return {
        "accuracy_of_fedkseed_20": seeded["accuracy"],
        "accuracy_of_fedavg": averaged["accuracy"],
        "bytes_of_fedavg_over_fedkseed_20": averaged["client_round_bytes"] / seeded["client_round_bytes"],
    }


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__.partition("\n")[0])
    table: list[dict[str, Any]] = []
    with session(None, 2):
        for row in rows(options.quick):
            table.append(row)
            print(row, flush=True)
    finish("federated_quality", table, headline_of(table), options)


if __name__ == "__main__":
    main()
