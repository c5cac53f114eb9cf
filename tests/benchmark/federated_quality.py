"""What federated methods reach, and for how many bytes, where clients are alike and where they are not.

    python tests/benchmark/federated_quality.py                     # digits, five seeds: an hour and a half of one core
    python tests/benchmark/federated_quality.py --quick             # one seed of Dirichlet 0.5: 9 minutes
    python tests/benchmark/federated_quality.py --rows sst2         # MiniLM; also --partition, --method, --rate
    python tests/benchmark/federated_quality.py --rows shakespeare  # a GPT, with the speakers of plays as clients

digits: handwritten digits, 2,410 parameters from random weights, 100 clients, IID and Dirichlet 0.5 and 0.1.
sst2: all 22.7M parameters of MiniLM, from a head of prototypes of 16 sentences a class, 100 clients, likewise.
shakespeare: a GPT of bytes that was trained on the source of the standard library first, with 278 speakers as clients;
the end of the file is held out, which has other plays.

10 clients take part in a round. In all rows of a group a client takes the same number of steps over all rounds, of two
forward passes or of a gradient; "centralised" has one client with all of the data and ten directions a step, so as many
forward passes. Each method's learning rate is the best of some, on each partition, by the loss on a tenth of the
training examples, or of the speakers, that no client has; these runs are shorter. Rows are measured with all training
examples at the clients, on those that are held out. All is done in this process, which gives what `raytrain federate`
does, to the bit.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import RESULTS, finish, parse, parser_of
from federated_rows import (
    BESIDE,
    CENTRALISED,
    DIGITS,
    GROUPS,
    KSEED,
    PARTITIONS,
    QUICK,
    QUICK_START_STEPS,
    SPEAKERS,
    START_MODEL,
    START_STEPS,
    Group,
    recipe_of,
)

from federated.broadcast import payload_bytes
from federated.build import Federation, protocol_of
from federated.flower.channel import GridMessenger
from federated.flower.identity import FIRST_NODE, assume_identity
from federated.flower.strategy_run import StrategyRun, load_gradient_clients
from federated.flower.testing import InProcessGrid
from federated.recipe import FederateRecipe
from federated.server import CommunicationRound

SEEDS = 5


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        metrics: of its last model.
        curve: (megabytes of all messages until then, metric), at each evaluation.
        client_round_bytes: of a message and its answer.
        seconds: it took.
    """

    metrics: Mapping[str, float]
    curve: list[list[float]]
    client_round_bytes: float
    seconds: float


def start(recipe: FederateRecipe) -> tuple[Callable[[], CommunicationRound], Callable[[], dict[str, float]]]:
    """Return what plays a run's next round, and what evaluates its model."""
    if recipe.seeded:
        federation = Federation.of(recipe)
        server = federation.server()
        return federation.simulation(server).play_round, partial(federation.evaluate, server)
    run, grid = StrategyRun(recipe), InProcessGrid(load_gradient_clients(recipe.to_dict()))
    messenger = GridMessenger(grid, range(FIRST_NODE, FIRST_NODE + run.partition.clients))
    return partial(run.play_round, messenger), run.evaluate


def play(recipe: FederateRecipe, metric: str, points: int) -> Outcome:
    """Play a run to its end, and evaluate it some times."""
    began, (play_round, evaluate) = time.perf_counter(), start(recipe)
    curve, sent, messages = [[0.0, evaluate()[metric]]], 0, 0
    for number in range(1, recipe.rounds + 1):
        done = play_round()
        sent += done.bytes_down + done.bytes_up
        messages += len(done.heard)
        if number * points // recipe.rounds > (number - 1) * points // recipe.rounds:
            metrics = evaluate()
            curve.append([sent / 1e6, metrics[metric]])
    each = sum(payload_bytes(protocol_of(recipe), recipe.clients.per_round, 10)) if recipe.seeded else sent / messages
    return Outcome(metrics, curve, each, time.perf_counter() - began)


def tuned_rate(group: Group, method: str, partition: str) -> float:
    """Return the rate with the lowest loss on examples that no client has."""
    rates, losses = group.methods[method].rates, {}
    if not group.tuning_steps:
        return rates[1]
    task = {"task.name": f"federated_rows:{group.tuning}", "seed": 0}
    for rate in rates:
        outcome = play(recipe_of(group, method, partition, group.tuning_steps, rate).with_overrides(task), "loss", 1)
        losses[rate] = outcome.metrics["loss"]
        print(f"    {method}, {partition}, rate {rate:g}: {outcome.metrics}, {outcome.seconds:.1f} s", flush=True)
    return min(losses, key=losses.__getitem__)


def row_of(name: str, group: Group, method: str, partition: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return a row of the table, the means over its seeds."""
    rate, count = options.rate or tuned_rate(group, method, partition), options.seeds
    recipe = recipe_of(group, method, partition, group.steps, rate)
    recipe = recipe.with_overrides({"evaluation.clients": group.clients})
    seeded = [recipe.with_overrides({"seed": seed}) for seed in range(1, count + 1)]
    outcomes = [play(each, group.metric, group.points) for each in seeded]
    values = [outcome.metrics[group.metric] for outcome in outcomes]

    def mean(name: str) -> float:
        return statistics.mean(outcome.metrics[name] for outcome in outcomes)

    return {
        "data": name,
        "partition": partition,
        "method": method,
        "rate": rate,
        "start": statistics.mean(outcome.curve[0][1] for outcome in outcomes),
        "quality": mean(group.metric),
        "range": max(values) - min(values),
        "clients": mean("clients") if group.clients else None,
        "worst_tenth": mean("worst_tenth") if group.clients else None,
        "rounds": recipe.rounds,
        "client_round_bytes": outcomes[0].client_round_bytes,
        "megabytes": outcomes[0].curve[-1][0],
        "seconds": statistics.median(outcome.seconds for outcome in outcomes),
        "seeds": count,
        "curve": outcomes[0].curve,
    }


def headline_of(table: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures that are wanted, of the rows that were measured."""
    found = {(row["data"], row["partition"], row["method"]): row for row in table}
    of_seeds = [name for name in DIGITS if name not in BESIDE]
    wanted = {
        "digits_kseed_iid": ("digits", "iid", ["fedkseed, 200 steps", KSEED]),
        "digits_centralised": ("digits", "iid", [CENTRALISED]),
        "digits_best_seeds_dirichlet01": ("digits", "dirichlet 0.1", of_seeds),
        "digits_fedavg_dirichlet01": ("digits", "dirichlet 0.1", ["FedAvg"]),
        "digits_best_seeds_dirichlet05": ("digits", "dirichlet 0.5", of_seeds),
        "digits_fedavg_dirichlet05": ("digits", "dirichlet 0.5", ["FedAvg"]),
        "sst2_centralised": ("sst2", "iid", [CENTRALISED]),
        "sst2_kseed_iid": ("sst2", "iid", [KSEED]),
        "sst2_kseed_dirichlet05": ("sst2", "dirichlet 0.5", [KSEED]),
        "shakespeare_kseed": ("shakespeare", "domain", [KSEED]),
        "shakespeare_fedavg": ("shakespeare", "domain", ["FedAvg"]),
    }
    headline = {
        name: max(found[data, partition, method]["quality"] for method in methods if (data, partition, method) in found)
        for name, (data, partition, methods) in wanted.items()
        if any((data, partition, method) in found for method in methods)
    }
    starts = {row["data"]: row["start"] for row in table if row["method"] in (KSEED, CENTRALISED)}
    return {f"{data}_start": value for data, value in starts.items()} | headline


def plot(table: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the accuracy on digits over the bytes of all messages, for each partition."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    measured = [name for name in PARTITIONS if any(row["partition"] == name for row in table)]
    figure, places = pyplot.subplots(1, len(measured), figsize=(2.2 + 4.2 * len(measured), 4.4), squeeze=False)
    for place, partition in zip(places[0], measured, strict=True):
        for number, method in enumerate(name for name in DIGITS if name != CENTRALISED):
            style = {"color": f"C{number}", "linestyle": ":" if method in BESIDE else "-"}
            for row in table:
                if (row["partition"], row["method"]) == (partition, method):
                    megabytes, accuracies = zip(*row["curve"][1:], strict=True)
                    place.plot(megabytes, accuracies, marker="o", markersize=3, label=method, **style)
        for row in table:
            if row["method"] == CENTRALISED:
                place.axhline(row["quality"], color="black", linewidth=0.8, label="centralised, no messages")
        place.set(xscale="log", xlabel="MB, both ways, all clients", title=partition, ylim=(0, 1))
        place.grid(alpha=0.3)
    places[0][0].set_ylabel("accuracy on held-out digits")
    figure.legend(*places[0][0].get_legend_handles_labels(), fontsize=8, loc="center right")
    figure.tight_layout(rect=(0, 0, 1 - 2.3 / figure.get_figwidth(), 1))
    figure.savefig(file)


def train_start(folder: Path, steps: int) -> Path:
    """Train the GPT that speakers begin with on the source of the standard library, and return its run."""
    changes = {"steps": steps, "workers": 1, "batch": 32, "precision": "float32", "schedule.warmup": steps // 20}
    changes |= {f"task.{name}": value for name, value in START_MODEL.items()} | {"evaluation.every": steps}
    words = ["train", "stdlib-lm", *(f"{name}={value}" for name, value in changes.items()), "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "raytrain", *words], check=True)
    return folder


def group_of(name: str, options: argparse.Namespace, folder: Path) -> Group:
    """Return the rows of a name, with their data; what has to be made first goes into a folder."""
    group = replace(GROUPS[name], **QUICK[name]) if options.quick else GROUPS[name]
    if name == "sst2":
        return replace(group, changes={"task.path": str(options.data / "sst2")})
    if name == "shakespeare":
        steps = QUICK_START_STEPS if options.quick else START_STEPS
        begun = options.start or train_start(folder / "start", steps)
        where = {"task.path": str(options.data / "tinyshakespeare" / "input.txt"), "start": str(begun)}
        return replace(group, changes={**{f"task.{field}": value for field, value in START_MODEL.items()}, **where})
    return group


def measure(name: str, group: Group, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows that are asked for."""
    methods = [method for method in group.methods if not options.method or method in options.method]
    for partition in group.partitions:
        for method in methods if not options.partition or partition in options.partition else []:
            if method != CENTRALISED or partition == "iid":
                yield row_of(name, group, method, partition, options)


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__.partition("\n")[0])
    known = sorted({method for group in GROUPS.values() for method in group.methods})
    parser.add_argument("--rows", choices=GROUPS, action="append", help="of which data: measure these, keep others")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each row")
    parser.add_argument("--partition", choices=[*PARTITIONS, *SPEAKERS], action="append", help="likewise")
    parser.add_argument("--method", choices=known, action="append", help="likewise")
    parser.add_argument("--rate", type=float, help="learning rate, found before; default: the best of some")
    parser.add_argument("--start", type=Path, help="run of the GPT that speakers begin with; default: one is trained")
    options = parse(parser)
    if options.quick:
        options.seeds = 1
    file = options.json or RESULTS / f"federated_quality{'-quick' if options.quick else ''}.json"
    before = json.loads(file.read_text())["rows"] if file.is_file() else []
    table = {(row["data"], row["partition"], row["method"]): row for row in before}
    torch.set_num_threads(1)
    assume_identity(run_id=1)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.rows or ["digits"]:
            for row in measure(name, group_of(name, options, Path(folder)), options):
                table[name, row["partition"], row["method"]] = row
                print({key: value for key, value in row.items() if key != "curve"}, flush=True)
    keys = [
        (name, partition, method)
        for name, group in GROUPS.items()
        for partition in group.partitions
        for method in group.methods
    ]
    rows = [table[key] for key in keys if key in table]
    finish("federated_quality", rows, headline_of(rows), options)
    if on_digits := [row for row in rows if row["data"] == "digits"]:
        plot(on_digits, file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
