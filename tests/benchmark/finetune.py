"""Fine-tuning a small encoder on SST-2: in full, half of it at a time, through adapters, and with forward passes alone.

    python tests/benchmark/finetune.py

Each run is `raytrain train RECIPE`: every method with seeds 0, 1, 2 (with `--quick`: seed 0), five hours on two cores,
which `--methods`, `--seeds` and `--runs FILE` cut into pieces. `sst2-minilm` has two workers and 430 steps. "half"
trains a random half of each block's layers, "half-rotated" another one every 100 steps. `sst2-minilm-zo` has one worker
and 1,500 steps of 32 sentences. "adamw" and "head" are with gradients, on the same sentences in the same order; "head"
moves the last layer alone.

The accuracy is that of the last evaluation, on the 872 sentences of dev.tsv, by which nothing was chosen but the
settings of `sst2-minilm-zo`. Memory is the most that a worker held at any time, and that minus what it held just before
the model was made. LoRA's learning rate and size are usual ones; RandLoRA learned nothing at a rate of 1e-3, and in 60
steps more at 3e-4 than at 1e-4.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from bench import finish, parse, parser_of
from torch import nn

from raytrain.replica import Replica
from raytrain.task import Task
from raytrain.tasks.classify import ClassifyOptions, classify

FIRST_ORDER = {"optimizer.name": "adamw", "schedule.name": "linear", "schedule.warmup": 150}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("sst2-minilm", {}),
    "half": ("sst2-minilm", {"freeze.half": True}),
    "half-rotated": ("sst2-minilm", {"freeze.half": True, "freeze.every": 100}),
    "lora": ("sst2-minilm", {"adapter.name": "lora", "adapter.r": 8, "adapter.lora_alpha": 16, "optimizer.lr": 1e-3}),
    "randlora": (
        "sst2-minilm",
        {"adapter.name": "randlora", "adapter.r": 16, "adapter.randlora_alpha": 320, "optimizer.lr": 3e-4},
    ),
    "zo": ("sst2-minilm-zo", {}),
    "adamw": ("sst2-minilm-zo", {**FIRST_ORDER, "optimizer.lr": 5e-5}),
    "head": ("sst2-minilm-zo", {**FIRST_ORDER, "optimizer.lr": 1e-3, "freeze.match": ["encoder.*"]}),
}


class NotedOptions(ClassifyOptions):
    """The options of `classify`."""


def noted(options: NotedOptions) -> Task:
    """Return the task `classify`, whose workers note their memory before the model is made."""
    task = classify(options)

    def model(seed: int) -> nn.Module:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        (Path(os.environ["FINETUNE_NOTES"]) / f"before-{os.getpid()}").write_text(str(before))
        return task.model(seed)

    return replace(task, model=model)


def note_peak(replica: Replica) -> None:
    """Note the peak and the trained parameters once in a while, so rarely that it costs nothing."""
    if replica.progress.step % 20 == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        folder = Path(os.environ["FINETUNE_NOTES"])
        (folder / f"peak-{os.getpid()}").write_text(str(peak))
        trained = sum(value.numel() for value in replica.module.parameters() if value.requires_grad)
        (folder / f"trained-{os.getpid()}").write_text(str(trained))


def run(data: Path, seed: int, recipe: str, changes: dict[str, Any]) -> dict[str, float]:
    """Train a recipe once; return the accuracy, the seconds of training and the memory of a worker."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        fields = {
            "task.name": "finetune:noted",
            "task.path": data / "sst2",
            "seed": seed,
            "callbacks": ["finetune:note_peak"],
            "log.to": [],
            **changes,
        }
        words = [
            f"{field}={json.dumps(value) if isinstance(value, bool | list) else value}"
            for field, value in fields.items()
        ]
        subprocess.run(
            [sys.executable, "-m", "raytrain", "train", recipe, *words, "--out", str(out)],
            check=True,
            cwd=Path(__file__).parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"FINETUNE_NOTES": folder},
        )
        result = json.loads((out / "result.json").read_text())
        notes = {
            kind: max(int(file.read_text()) for file in Path(folder).glob(f"{kind}-*"))
            for kind in ("before", "peak", "trained")
        }
    return {
        "accuracy": result["metrics"]["accuracy"],
        "seconds": result["seconds"],
        "trained": notes["trained"],
        "peak_megabytes": notes["peak"] / 1e6,
        "added_megabytes": (notes["peak"] - notes["before"]) / 1e6,
    }


def table(runs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return a row for each method, the mean over its seeds, and the headline."""
    rows, headline = [], {}
    for method in METHODS:
        mine = [each for each in runs if each["method"] == method]
        if mine:
            accuracies = [each["accuracy"] for each in mine]
            row = {"method": method, "seeds": len(mine), "accuracy": statistics.mean(accuracies)}
            row |= {"low": min(accuracies), "high": max(accuracies)}
            row |= {
                key: statistics.mean(each[key] for each in mine)
                for key in mine[0]
                if key not in ("method", "seed", "accuracy")
            }
            rows.append(row)
            headline[f"accuracy_{method.replace('-', '_')}"] = row["accuracy"]
    return rows, headline


def main() -> None:
    """Measure what is not measured yet, and report."""
    parser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, help="a file that keeps the runs: those that it holds are not made again")
    options = parse(parser)
    seeds = [0] if options.quick else options.seeds
    runs = json.loads(options.runs.read_text()) if options.runs and options.runs.is_file() else []
    for seed, method in product(seeds, options.methods):
        if any((each["method"], each["seed"]) == (method, seed) for each in runs):
            continue
        runs.append({"method": method, "seed": seed, **run(options.data.absolute(), seed, *METHODS[method])})
        print(runs[-1], flush=True)
        if options.runs:
            options.runs.write_text(json.dumps(runs))
    finish("finetune", *table(runs), options)


if __name__ == "__main__":
    main()
