"""Fine-tuning a small encoder on SST-2: in full, half of it at a time, through adapters, and with forward passes alone.

    python tests/benchmark/finetune.py

Each run is `raytrain train RECIPE`: every method with seeds 0, 1, 2 (with `--quick`: seed 0), a day on two cores, which
`--methods`, `--seeds` and `--runs FILE` cut into pieces. `sst2-minilm` has two workers and 430 steps. "half" trains a
random half of each block's layers, "half-rotated" another one every 100 steps.

`sst2-minilm-zo` has one worker and 1,500 steps of 32 sentences, and eight directions in each; "zo-start" is what it
starts from. "zo-pair" has one direction and its opposite, and so have the others, which change its stepper, or lower
the loss: their learning rates move the model about as far, and no others were tried. "zo-hybrid" has gradients for the
last of six blocks and the head. "adamw" and "head" are with gradients, from the same start on the same sentences in the
same order, and "head" moves the last layer alone. `--here` trains those of `sst2-minilm-zo` in processes of this
machine, without Ray, on a GPU 14 at a time, so that their seconds say little.

The accuracy is that of the last evaluation, on the 872 sentences of dev.tsv. The settings of `sst2-minilm-zo` were
chosen from trials that were measured on these and on the 1,821 of test.tsv; by dev.tsv nothing else was. Memory is the
most that a worker held while it trained, and that minus what it held just before the model was made; with
`--here cuda` it is what torch held on the GPU. LoRA's learning rate and size are usual ones; RandLoRA learned nothing
at a rate of 1e-3, and in 60 steps more at 3e-4 than at 1e-4.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bench import finish, parse, parser_of
from torch import nn

from raytrain.overrides import apply_overrides, parse_overrides
from raytrain.recipe import read_toml
from raytrain.tasks.classify import ClassifyOptions, classify
from raytrain.tasks.task import Task
from raytrain.testing import train_here
from raytrain.training.kind import KIND
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Replica

AT_ONCE = 14
"""Runs on a GPU at the same time: it is idle for most of each."""
FIRST_ORDER = {"optimizer.name": "adamw", "schedule.name": "linear", "schedule.warmup": 150}
PAIR = {"zo.num_perturbations": 1, "zo.estimator": "central"}
PAIR_BY_LOSS = {**PAIR, "zo.objective": "", "optimizer.lr": 1e-5}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("sst2-minilm", {}),
    "half": ("sst2-minilm", {"freeze.random_half": True}),
    "half-rotated": ("sst2-minilm", {"freeze.random_half": True, "freeze.every": 100}),
    "lora": ("sst2-minilm", {"adapter.name": "lora", "adapter.r": 8, "adapter.lora_alpha": 16, "optimizer.lr": 1e-3}),
    "randlora": (
        "sst2-minilm",
        {"adapter.name": "randlora", "adapter.r": 16, "adapter.randlora_alpha": 320, "optimizer.lr": 3e-4},
    ),
    "zo": ("sst2-minilm-zo", {}),
    "zo-start": ("sst2-minilm-zo", {"steps": 1, "optimizer.lr": 1e-30}),
    "zo-pair": ("sst2-minilm-zo", {**PAIR, "optimizer.lr": 2e-5}),
    "zo-sign": ("sst2-minilm-zo", {**PAIR, "optimizer.name": "zo-sgd-sign", "optimizer.lr": 5e-5}),
    "zo-momentum": ("sst2-minilm-zo", {**PAIR, "optimizer.name": "zo-sgd-momentum", "optimizer.lr": 2e-6}),
    "zo-adam": ("sst2-minilm-zo", {**PAIR, "optimizer.name": "zo-adam", "optimizer.lr": 5e-5}),
    "zo-conservative": ("sst2-minilm-zo", {**PAIR, "optimizer.name": "zo-sgd-conservative", "optimizer.lr": 2e-5}),
    "zo-loss": ("sst2-minilm-zo", PAIR_BY_LOSS),
    "forward-gradient": ("sst2-minilm-zo", {**PAIR_BY_LOSS, "optimizer.name": "forward-gradient"}),
    "zo-hybrid": (
        "sst2-minilm-zo",
        {
            **PAIR_BY_LOSS,
            "optimizer.name": "zo-hybrid",
            "optimizer.first_order_lr": 5e-5,
            "zo.first_order": ["encoder.encoder.layer.5.*", "classifier.*"],
            "zo.trajectory": False,
        },
    ),
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
    if replica.progress.step % 20 != 1:
        return
    trained = sum(value.numel() for value in replica.module.parameters() if value.requires_grad)
    notes = {"trained": trained, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if replica.device.type == "cuda":
        notes |= {"peak": torch.cuda.max_memory_allocated(), "before": 0}
    for kind, value in notes.items():
        (Path(os.environ["FINETUNE_NOTES"]) / f"{kind}-{os.getpid()}").write_text(str(value))


def run(data: Path, seed: int, recipe: str, changes: dict[str, Any], here: str) -> dict[str, float]:
    """Train a recipe once; return the accuracy, the seconds of training and the memory of a worker.

    Args:
        data: folder of the data sets.
        seed: of the run.
        recipe: its name.
        changes: of its fields.
        here: the device to train on in a process without Ray; "": on Ray, on the processor.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        fields = {
            "task.name": "finetune:noted",
            "task.path": data / "sst2",
            "seed": seed,
            "callbacks": ["finetune:note_peak"],
            "log.loggers": [],
            **changes,
        }
        words = [
            f"{field}={json.dumps(value) if isinstance(value, bool | list) else value}"
            for field, value in fields.items()
        ]
        subprocess.run(
            [sys.executable, __file__, "--one", here, str(out), recipe, *words]
            if here
            else [sys.executable, "-m", "raytrain", "train", recipe, *words, "--out", str(out)],
            check=True,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            env=os.environ | {"FINETUNE_NOTES": folder},
        )
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        result = {"metrics": rows[-1]["valid"], "seconds": rows[-1]["seconds"]}
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


def changed(recipe: str, changes: Mapping[str, Any]) -> TrainRecipe:
    """Return a shipped recipe with other fields."""
    raw, _ = read_toml(recipe, [KIND.recipes])
    return TrainRecipe.parse(apply_overrides(raw, changes))


def one(device: str, out: str, recipe: str, *words: str) -> None:
    """Train a recipe in this process."""
    failure = train_here(changed(recipe, parse_overrides(words)), Path(out), device=device).failure()
    if failure:
        sys.exit(failure.message)


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
                if key not in ("method", "seed", "here", "accuracy")
            }
            rows.append(row)
            headline[f"accuracy_{method.replace('-', '_')}"] = row["accuracy"]
    return rows, headline


def main() -> None:
    """Measure what is not measured yet, and report."""
    parser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all there are")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, help="a file that keeps the runs: those that it holds are not made again")
    parser.add_argument("--here", choices=["cpu", "cuda"], default="", help="train without Ray, on this device")
    parser.add_argument("--one", nargs="+", help="of one run: the device, the folder, the recipe and its fields")
    options = parse(parser)
    if options.one:
        one(*options.one)
        return
    seeds = [0] if options.quick else options.seeds
    alone = [name for name, (recipe, _) in METHODS.items() if recipe == "sst2-minilm-zo"]
    methods = options.methods or (alone if options.here else list(METHODS))
    if options.here and (odd := [name for name in methods if name not in alone]):
        parser.error(f"--here: expected --methods of sst2-minilm-zo, which has one worker; got {', '.join(odd)}")
    runs = json.loads(options.runs.read_text()) if options.runs and options.runs.is_file() else []
    done = {(each["method"], each["seed"]) for each in runs if each.get("here", "") == options.here}
    todo = [(method, seed) for seed, method in product(seeds, methods) if (method, seed) not in done]

    def made(place: tuple[str, int]) -> dict[str, Any]:
        found = run(options.data.absolute(), place[1], *METHODS[place[0]], options.here)
        return {"method": place[0], "seed": place[1], "here": options.here, **found}

    with ThreadPoolExecutor(AT_ONCE if options.here == "cuda" else 1) as pool:
        begun = {pool.submit(made, place): place for place in todo}
        for ended in as_completed(begun):
            if isinstance(error := ended.exception(), subprocess.CalledProcessError):
                print(begun[ended], "failed:", error.stderr[-1000:], flush=True)
                continue
            runs.append(ended.result())
            print(runs[-1], flush=True)
            if options.runs:
                options.runs.write_text(json.dumps(runs))
    finish("finetune", *table([each for each in runs if each.get("here", "") == options.here]), options)


if __name__ == "__main__":
    main()
