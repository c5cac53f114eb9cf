"""A population of digit classifiers, trained by the loop that `raytrain train` uses, one segment after the other."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from raytrain.serialization import canonical_json, join_tensors, split_tensors, to_savable
from raytrain.sync.averaging import ExactExchange
from raytrain.sync.transport import LocalTransport
from raytrain.training.build import build, plan_of, task_of
from raytrain.training.evaluation import evaluate
from raytrain.training.loader import Walk, local_feed
from raytrain.training.loop import train
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Progress, Replica, load_state, plain, state_of
from search.journal.ancestry import schedule
from search.journal.journal import Journal
from search.recipe import SearchRecipe
from search.scheduling.driver import SegmentEnd, drive
from search.scheduling.work import Snapshot, Work

RAW: dict[str, Any] = {
    "kind": "search",
    "base": {
        "kind": "train",
        "steps": 30,
        "batch": 16,
        "task": {"name": "digits", "model": "mlp", "widths": [16], "dropout": 0.1},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "schedule": {"name": "cosine"},
    },
    "search": {
        "name": "pbt",
        "population": 8,
        "interval": 5,
        "metric": "loss",
        "mode": "min",
        "space": {
            "optimizer": {
                "lr": {"type": "float", "low": 1e-3, "high": 1, "scale": "log"},
                "momentum": {"type": "float", "low": 0.5, "high": 0.99, "scale": "one-minus"},
            },
            "task": {"dropout": {"type": "float", "low": 0, "high": 0.5, "step": 0.05}},
            "batch": {"type": "int", "low": 4, "high": 32},
        },
    },
}


class Metrics:
    """The loop's surroundings inside a segment: evaluate at its end, and save nothing."""

    def __init__(self, measure: Any) -> None:
        self._measure = measure
        self.values: Mapping[str, float] = {}

    def stop_requested(self) -> bool:
        return False

    def stepped(self, replica: Replica, values: dict[str, float]) -> None: ...

    def evaluate(self, replica: Replica) -> dict[str, float]:
        self.values = self._measure(module=replica.module)
        return dict(self.values)

    def save(self, replica: Replica) -> None: ...

    def note(self, replica: Replica, metrics: dict[str, float]) -> None: ...


def pack(state: Mapping[str, Any]) -> bytes:
    skeleton, tensors = split_tensors(state)
    return save(to_savable(tensors), {"state": canonical_json(skeleton).decode()})


def unpack(packed: bytes) -> Any:
    header = json.loads(packed[8 : 8 + int.from_bytes(packed[:8], "little")])
    return join_tensors(json.loads(header["__metadata__"]["state"]), load(packed))


def train_segment(base: TrainRecipe, work: Work, packed: bytes | None) -> SegmentEnd:
    recipe = base.with_overrides({"seed": work.seed, **work.changes})
    task, exchange = task_of(recipe), ExactExchange(LocalTransport())
    replica = build(recipe, task, exchange)
    if packed is not None:
        state = unpack(packed)
        load_state(replica, state["replica"], state["replica"], "the state")
        replica.progress = Progress(**{**state["progress"], "status": "running"})
    plan = replace(plan_of(recipe), steps=work.until, evaluate_every=0, checkpoint_every=0, patience=0)
    progress = replica.progress
    walk = Walk(plan.seed, 0, progress.position, plan.batch, plan.steps - progress.step, plan.batch, plan.accumulate)
    metrics = Metrics(partial(evaluate, task, examples=task.data("valid"), batch=512, exchange=exchange))
    with local_feed(task, recipe.task, walk) as feed:
        train(replica, task, feed, plan, metrics)
    shared = {**plain(progress), "seconds": 0.0, "stalled_seconds": 0.0}  # no state depends on the time that it took
    return SegmentEnd(pack({"replica": state_of(replica), "progress": shared}), progress.step, metrics.values)


class Interrupted(BaseException):
    """The process ends here."""


def search(folder: Path, end_after: int | None = None) -> Journal:
    """Go on with the search in a folder, to its end or through some segments."""
    folder.mkdir(exist_ok=True)
    recipe = SearchRecipe.parse(RAW)
    journal = Journal(folder, recipe.scheduler(recipe.objective("accuracy", "higher", {"accuracy", "loss"})))
    journal.open()
    trained = []

    def one(work: Work, packed: bytes | None) -> SegmentEnd:
        trained.append(work)
        if len(trained) == end_after:
            raise Interrupted
        return train_segment(recipe.base, work, packed)

    drive(journal, journal.store, one)
    return journal


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    torch.set_num_threads(1)  # sums depend on it, and the fixture that fixes it comes later
    return search(tmp_path_factory.mktemp("whole"))


def test_a_killed_search_makes_the_same_decisions(whole: Journal, tmp_path: Path) -> None:
    for end_after in (1, 12, 8, 17):
        with pytest.raises(Interrupted):
            search(tmp_path, end_after)
    again = search(tmp_path)
    assert again.lineage.path.read_bytes() == whole.lineage.path.read_bytes()
    assert again.best == whole.best


def test_the_population_improves(whole: Journal) -> None:
    rows = whole.lineage.read()
    first = [row["score"] for row in rows if "score" in row][:8]
    assert whole.best.score < min(first) / 1.5
    assert sum(row["action"] == "exploit" for row in rows) >= 8


def test_the_schedule_of_the_winner_trains_the_winner_again(whole: Journal) -> None:
    best, rows = whole.best, whole.lineage.read()
    phases = schedule(rows, best.segment.row)
    assert len(phases) > 2
    ends = [*(phase.from_step for phase in phases[1:]), best.snapshot.step]
    base, end = SearchRecipe.parse(RAW).base, None
    for phase, until in zip(phases, ends, strict=True):
        work = Work("", 0, 0, Snapshot("", phase.from_step), until, phase.changes, phase.seed)
        end = train_segment(base, work, end and end.state)
    assert end.metrics["loss"] == best.score
    winner, again = (unpack(packed)["replica"] for packed in (whole.store.get(best.snapshot.digest), end.state))
    assert all(winner["model"][name].equal(tensor) for name, tensor in again["model"].items())
