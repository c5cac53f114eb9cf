"""How well replicas learn that meet rarely, late, or both: every synchroniser against averaged gradients.

    python tests/benchmark/convergence.py [--runs FILE] [--rows PATTERN ...]

Four workers take equal samples, in 1,920 steps (40 rounds of 48): a GPT of 0.1M parameters on tinyshakespeare, with the
optimizer, the schedule and, on each worker, the batch of `shakespeare-delayed`, and the digits CNN with SGD and
momentum, batches of 8. Rounds of tau = 4, 12 and 48 steps; `ddp` and the default method have seeds 0 to 4, the
others 0 and 1. Four more rows for the GPT are with half and twice the learning rate. Gaps are means over seeds of
(method - gradients) with the same seed, with the half-width of the 95 % interval by Student's t. Workers are gloo
processes; `--runs` keeps what was done already, and `--rows "digits * co2*"` measures rows of that again: patterns of
"task tau method". With `--quick`: 96 steps, one seed.
"""

import json
import math
import statistics
from argparse import Namespace
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import finish, parse, parser_of
from scipy import stats

from raytrain.overrides import apply_overrides
from raytrain.run.directory import RunDirectory
from raytrain.run.rows import read_jsonl
from raytrain.testing import train_each_with_gloo
from raytrain.training.recipe import TrainRecipe

WORKERS = 4
ROUNDS = (4, 12, 48)
FEW, ALL = range(2), range(5)
AT_ONCE = 4  # runs of one set of processes

Fields = dict[str, Any]

TASKS: dict[str, tuple[str, Fields]] = {
    "gpt": (
        "loss",
        {
            "task": {"name": "text", "tokens": "chars", "model": "gpt", "layers": 2, "heads": 4, "width": 64},
            "task.block": 32,
            "batch": 12,
            "optimizer": {"name": "adamw", "lr": 4e-3, "betas": [0.9, 0.99], "weight_decay": 0.1},
            "schedule": {"name": "cosine", "warmup": 100, "min_lr_ratio": 0.1},
        },
    ),
    "digits": (
        "accuracy",
        {
            "task": {"name": "digits", "norm": "batch"},
            "batch": 8,
            "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
            "schedule": {"name": "cosine", "warmup": 50, "min_lr_ratio": 0.02},
        },
    ),
}


def methods(tau: int) -> Iterator[tuple[str, Fields, range]]:
    """Yield (what it is called in the table, its options, seeds) of each way to meet every `tau` steps."""
    yield "local-sgd", {"name": "local-sgd"}, FEW
    yield "slowmo", {"name": "slowmo"}, FEW
    yield "diloco", {"name": "diloco"}, FEW
    yield "cocod", {"name": "cocod"}, FEW
    for delay in sorted({1, tau // 4, tau // 2, tau}):
        headline = (tau, delay) in ((12, 3), (12, 12), (48, 12))
        yield f"delayed-averaging d={delay}", {"name": "delayed-averaging", "delay": delay}, ALL if headline else FEW
    if tau == 12:
        for delay, momentum in ((3, 0.0), (3, 0.5), (3, 0.85), (12, 0.0)):
            sync = {"name": "delayed-averaging", "delay": delay, "global_momentum": momentum}
            yield f"delayed-averaging d={delay} global_momentum={momentum:g}", sync, FEW
        yield "delayed-averaging d=12 alpha=1", {"name": "delayed-averaging", "delay": 12, "alpha": 1.0}, FEW
    yield "co2", {"name": "co2"}, FEW
    yield "co2 penalty=none", {"name": "co2", "penalty": "none"}, FEW
    yield "co2 penalty=constant", {"name": "co2", "penalty": "constant"}, FEW
    yield "co2 penalty=gap-aware", {"name": "co2", "penalty": "gap-aware"}, FEW
    yield "co2 clip=0", {"name": "co2", "clip": 0}, FEW


def cases() -> Iterator[tuple[str, int, str, Fields, range]]:
    """Yield (task, tau, method, options, seeds) of every row of the table; options are fields of the recipe."""
    every: list[tuple[str, int, str, Fields, range]] = []
    for task in TASKS:
        every.append((task, 1, "ddp", {"sync": {"name": "ddp"}}, ALL))
        for tau in ROUNDS:
            every += [(task, tau, name, {"sync": {**sync, "every": tau}}, seeds) for name, sync, seeds in methods(tau)]
    for lr in (2e-3, 8e-3):  # where learning is limited by the rate, and by noise
        rate = {"optimizer.lr": lr}
        late = {"name": "delayed-averaging", "every": 12, "delay": 3}
        every.append(("gpt", 1, f"ddp lr={lr:g}", {"sync": {"name": "ddp"}, **rate}, FEW))
        every.append(("gpt", 12, f"delayed-averaging d=3 lr={lr:g}", {"sync": late, **rate}, FEW))
    yield from every


def recipe(task: str, changes: Fields, seed: int, options: Namespace) -> TrainRecipe:
    """Return the recipe of a run."""
    fields = {
        "kind": "train",
        "workers": WORKERS,
        "steps": 96 if options.quick else 1920,
        "seed": seed,
        "log": {"every": 480, "loggers": []},
        **TASKS[task][1],
        **changes,
    }
    if task == "gpt":
        fields["task.path"] = str(options.data / "tinyshakespeare" / "input.txt")
    return TrainRecipe.parse(apply_overrides({}, fields))


Runs = dict[tuple[str, int, str, int], float]
"""(task, tau, method, seed) -> loss or accuracy; nan where the loss was no number any more."""


def measured(folder: Path, metric: str) -> float:
    """Return what a run came to."""
    run = RunDirectory(folder)
    if run.failure():
        return math.nan
    return float(next(row["valid"][metric] for row in reversed(read_jsonl(run.metrics)) if "valid" in row))


def wanted(options: Namespace) -> list[tuple[tuple[str, int, str, int], TrainRecipe]]:
    """Return all runs: seed by seed, those of the headline first."""
    every = [
        ((task, tau, name, seed), recipe(task, changes, seed, options), len(seeds))
        for task, tau, name, changes, seeds in cases()
        for seed in (seeds[:1] if options.quick else seeds)
        if task in options.tasks and any(fnmatchcase(f"{task} {tau} {name}", pattern) for pattern in options.rows)
    ]
    every.sort(key=lambda run: (run[2] != len(ALL), run[0][3], run[0][0] != "gpt", run[0][1] != 12))
    return [(key, plain) for key, plain, _ in every]


def run_all(options: Namespace, runs: Runs) -> None:
    """Train all that is not done, some runs at a time, and keep what they come to."""
    left = [(key, plain) for key, plain in wanted(options) if key not in runs]
    for first in range(0, len(left), AT_ONCE):
        with TemporaryDirectory() as folder:
            places = {key: Path(folder) / str(place) for place, (key, _) in enumerate(left[first : first + AT_ONCE])}
            if any(train_each_with_gloo([(plain, places[key]) for key, plain in left[first : first + AT_ONCE]])):
                raise RuntimeError("a worker died")
            runs |= {key: measured(place, TASKS[key[0]][0]) for key, place in places.items()}
        for key in places:
            print(*key, runs[key], flush=True)
        if options.runs:
            options.runs.write_text(json.dumps([[*key, value] for key, value in sorted(runs.items())], indent=0) + "\n")


def against(runs: Runs, task: str, tau: int, method: str) -> dict[str, float]:
    """Return the mean of a method over its seeds, and how far it is from gradients at the same learning rate."""
    values = {seed: value for (*key, seed), value in runs.items() if key == [task, tau, method]}
    plain = " ".join(["ddp", *(word for word in method.split() if word.startswith("lr="))])
    gaps = [value - runs[task, 1, plain, seed] for seed, value in values.items() if (task, 1, plain, seed) in runs]
    wide = (
        stats.t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    )
    return {
        "seeds": len(values),
        "mean": statistics.mean(values.values()),
        "gap": statistics.mean(gaps) if gaps else math.nan,  # without rows of `ddp` there is nothing to compare with
        "half_width": float(wide),
    }


def report(runs: Runs) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return a row for each method, and the headline, of the runs there are."""
    table = []
    for task, tau, method in sorted({key[:3] for key in runs}):
        table.append({"task": task, "tau": tau, "method": method, **against(runs, task, tau, method)})
    found = {(row["task"], row["tau"], row["method"]): row for row in table}
    headline = {}
    for name, tau, delay in (("tau12", 12, 3), ("tau12_full_round", 12, 12), ("tau48", 48, 12)):
        if row := found.get(("gpt", tau, f"delayed-averaging d={delay}")):
            whole = found["gpt", 1, "ddp"]["mean"]
            headline[f"gpt_relative_gap_{name}"] = row["gap"] / whole
            headline[f"gpt_relative_gap_{name}_half_width"] = row["half_width"] / whole
    if row := found.get(("digits", 12, "delayed-averaging d=3")):
        headline["digits_accuracy_gap_tau12"] = -row["gap"]
        headline["digits_accuracy_gap_tau12_half_width"] = row["half_width"]
    return table, headline


def main() -> None:
    """Train what is not done, and report."""
    parser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument(
        "--runs", type=Path, help="a file that keeps what runs came to: those that it holds are not made"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs="+", default=[], help='rows to measure again, as in --rows "digits 48 co2*"')
    options = parse(parser)
    options.data = options.data.absolute()
    runs: Runs = {}
    if options.runs and options.runs.is_file():
        runs = {(task, tau, name, seed): value for task, tau, name, seed, value in json.loads(options.runs.read_text())}
    again = {key for key, _ in wanted(options)} if options.rows else set()
    runs = {key: value for key, value in runs.items() if key not in again}
    options.rows = options.rows or ["*"]
    run_all(options, runs)
    finish("convergence", *report(runs), options)


if __name__ == "__main__":
    main()
