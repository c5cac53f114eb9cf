"""Loss curves of some training recipes, recorded once: 27 small GPTs on the bytes of tinyshakespeare."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from raytrain.training.recipe import TrainRecipe
from search.chooser import Chooser
from search.launch.trial import Trial
from search.scheduling.work import Snapshot, Work
from search.searchers.random import RandomSearcher
from search.space import Space

INTERVAL = 60
"""Steps between two evaluations."""


@dataclass(frozen=True, slots=True)
class Recording:
    """The curve of a recipe.

    Attributes:
        changes: of the base recipe.
        losses: held-out loss after each interval.
        step_seconds: of each interval's steps, with the unpacking of the state before them. Seconds are those of the
            processor, which on one thread are those of the clock if nothing else runs.
        end_seconds: of the evaluation and the packing after them.
    """

    changes: Mapping[str, Any]
    losses: list[float]
    step_seconds: list[float]
    end_seconds: list[float]


def recipes(choose: Chooser) -> dict[str, Any]:
    """Return architecture and recipe of a small GPT."""
    return {
        "task.layers": choose.int("layers", 1, 2),
        "task.width": choose.ordered("width", [24, 32, 48]),
        "task.dropout": choose.ordered("dropout", [0.0, 0.1, 0.2]),
        "batch": choose.ordered("batch", [4, 6, 8]),
        "optimizer.lr": choose.float("lr", 3e-4, 3e-2, log=True),
        "optimizer.weight_decay": choose.float("decay", 1e-3, 0.3, log=True),
        "schedule.name": choose.one_of("schedule", ["linear", "cosine", "wsd"]),
        "schedule.min_lr_ratio": choose.ordered("floor", [0.0, 0.1]),
    }


def base_recipe(data: Path, steps: int) -> TrainRecipe:
    """Return the recipe that they change."""
    task = {"name": "text", "path": str(data / "tinyshakespeare" / "input.txt"), "tokens": "bytes", "model": "gpt",
            "heads": 4, "block": 64, "valid": 0.01}  # fmt: skip
    optimizer = {"name": "adamw", "lr": 4e-3, "betas": [0.9, 0.99]}
    raw = {"kind": "train", "name": "shakespeare", "steps": steps, "batch": 8, "schedule": {"warmup": 20}}
    return TrainRecipe.parse({**raw, "task": task, "optimizer": optimizer})


def record(base: TrainRecipe, changes: Mapping[str, Any]) -> Recording:
    """Train a recipe to the end as a trial of a search does, in segments of one interval."""
    until, reached, ended = 0, 0.0, 0.0

    def beat(step: int) -> None:
        nonlocal reached
        reached = reached or (time.process_time() if step == until else 0.0)

    trial, state = Trial(base, torch.device("cpu"), beat), None
    recording = Recording(changes, [], [], [])
    for until in range(INTERVAL, base.steps + 1, INTERVAL):
        before = Snapshot("recorded" if state else "", until - INTERVAL)
        reached, began = 0.0, time.process_time()
        end = trial.train(Work("0.0.0", 0, 0, before, until, changes, base.seed), state)
        ended = time.process_time()
        state = end.state
        recording.losses.append(float(end.metrics["loss"]))
        recording.step_seconds.append(reached - began)
        recording.end_seconds.append(ended - reached)
    return recording


def recordings(file: Path, data: Path, count: int, steps: int) -> list[Recording]:
    """Return the curves of `count` recipes: those in the file, and the others, which are trained and added to it."""
    found = [Recording(**json.loads(line)) for line in file.read_text().splitlines()] if file.is_file() else []
    file.parent.mkdir(parents=True, exist_ok=True)
    for recording in _missing(data, count, steps, len(found)):
        with file.open("a") as lines:
            lines.write(json.dumps(asdict(recording)) + "\n")
        found.append(recording)
    return found


def _missing(data: Path, count: int, steps: int, done: int) -> Iterator[Recording]:
    base = base_recipe(data, steps)
    for number, candidate in enumerate(RandomSearcher(Space(recipes), 0).ask(range(count))[done:], done):
        recording = record(base, dict(candidate.configuration.changes))
        seconds = sum(recording.step_seconds) + sum(recording.end_seconds)
        print(f"recipe {number}: loss {recording.losses[-1]:.4f} after {seconds:.0f} s", flush=True)
        yield recording
