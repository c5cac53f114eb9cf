"""A population of digit classifiers, trained by the loop that `raytrain train` uses, one segment after the other."""

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.errors import TrainingError
from raytrain.run.rows import read_jsonl
from raytrain.serialization import unpack
from raytrain.testing import train_here
from raytrain.training.recipe import TrainRecipe
from search.journal.ancestry import schedule
from search.journal.journal import Journal
from search.launch.trial import Trial
from search.launch.winner import winner_recipe
from search.recipe import SearchRecipe
from search.scheduling.driver import SegmentEnd, drive
from search.scheduling.segments import Objective
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


def trial(base: TrainRecipe) -> Trial:
    return Trial(base, torch.device("cpu"), lambda step: None)


class Interrupted(BaseException):
    """The process ends here."""


def search(folder: Path, end_after: int | None = None) -> Journal:
    """Go on with the search in a folder, to its end or through some segments."""
    folder.mkdir(exist_ok=True)
    recipe = SearchRecipe.parse(RAW)
    journal = Journal(folder, recipe.scheduler(recipe.objective("accuracy", "higher", {"accuracy", "loss"})))
    journal.open()
    trained: list[Work] = []
    train = trial(recipe.base).train

    def one(work: Work, packed: bytes | None) -> SegmentEnd:
        trained.append(work)
        if len(trained) == end_after:
            raise Interrupted
        return train(work, packed)

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


def test_a_resume_reads_no_pickle(tmp_path: Path) -> None:
    """Pickles that can do harm import names, which an audit hook sees."""
    found: list[tuple[Any, ...]] = []
    watching = False
    sys.addaudithook(lambda event, args: found.append(args) if watching and event == "pickle.find_class" else None)
    with pytest.raises(Interrupted):
        search(tmp_path, 12)
    watching = True
    try:
        with pytest.raises(Interrupted):
            search(tmp_path, 8)
        seen = list(found)
        pickle.loads(pickle.dumps(Path))
    finally:
        watching = False
    assert seen == []
    assert found, "the hook sees what it should"


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
    train, end = trial(SearchRecipe.parse(RAW).base).train, None
    for phase, until in zip(phases, ends, strict=True):
        work = Work("", 0, 0, Snapshot("", phase.from_step), until, phase.changes, phase.seed)
        end = train(work, end and end.state)
    assert end.metrics["loss"] == best.score
    winner, again = (unpack(packed)["replicas"][0] for packed in (whole.store.get(best.snapshot.digest), end.state))
    assert all(winner["model"][name].equal(tensor) for name, tensor in again["model"].items())


def test_a_winner_of_other_shapes_and_with_new_optimizer_states_trains_again(tmp_path: Path) -> None:
    space = {
        "optimizer": {"lr": {"type": "float", "low": 1e-3, "high": 0.1, "scale": "log"}},
        "task": {"widths": {"type": "choice", "values": [[16], [24], [32]]}},
    }
    more = {"population": 4, "space": space, "optimizer_state": "reset", "other_shapes": "overlap"}
    raw = {**RAW, "base": {**RAW["base"], "optimizer": "adamw"}, "search": {**RAW["search"], **more}, "seed": 2}
    recipe = SearchRecipe.parse(raw)
    journal = Journal(tmp_path, recipe.scheduler(Objective("loss", "lower")))
    journal.open()
    drive(journal, journal.store, trial(recipe.base).train)
    phases = schedule(journal.lineage.read(), journal.best.segment.row)
    assert len({str(phase.changes["task.widths"]) for phase in phases}) > 1
    assert [phase.reset_optimizer for phase in phases] == [False] + [True] * (len(phases) - 1)
    again = winner_recipe(recipe.base, phases).with_overrides({"evaluation.every": 5})
    rows = read_jsonl(train_here(again, tmp_path / "again").metrics)
    (found,) = (row for row in rows if "valid" in row and row["step"] == journal.best.snapshot.step)
    assert found["valid"]["loss"] == journal.best.score


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}},
    "adamw": {"optimizer": {"name": "adamw"}, "ema": 0.9},
    "zo-sgd": {"optimizer": {"name": "zo-sgd", "lr": 1e-3}, "zo": {"sparsity": 0.5, "trajectory": False}},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=5)
@given(st.sets(st.integers(1, 11), max_size=3))
def test_segments_are_the_training_that_they_are_parts_of(name: str, cuts: set[int]) -> None:
    base = SearchRecipe.parse(RAW).base.with_overrides({"steps": 12, **OPTIMIZERS[name]})
    whole = trial(base).train(Work("", 0, 0, Snapshot(), 12, {}, seed=3), None)
    train, end = trial(base).train, None
    for until in sorted({*cuts, 12}):
        end = train(Work("", 0, 0, Snapshot("a", end.step if end else 0), until, {}, seed=3), end and end.state)
    assert end is not None
    assert end.metrics == whole.metrics
    assert same_model(end, whole)


def same_model(one: SegmentEnd, other: SegmentEnd) -> bool:
    models = [unpack(end.state)["replicas"][0]["model"] for end in (one, other)]
    return models[0].keys() == models[1].keys() and all(models[0][name].equal(models[1][name]) for name in models[0])


def test_a_trial_that_is_asked_to_stop_ends_after_its_step() -> None:
    base = SearchRecipe.parse(RAW).base
    steps: list[int] = []
    one = Trial(base, torch.device("cpu"), lambda step: (steps.append(step), step == 3 and one.stop()))
    end = one.train(Work("", 0, 0, Snapshot(), 30, {}, seed=0), None)
    assert (end.step, end.metrics) == (4, {})
    assert steps == sorted(steps)


def test_a_model_that_is_no_longer_of_numbers_fails_its_segment() -> None:
    base = SearchRecipe.parse(RAW).base.with_overrides({"optimizer.lr": 1e30, "clip": 0})
    with pytest.raises(TrainingError, match="^(the loss is (nan|inf) in step|after step 1 the weights)"):
        trial(base).train(Work("", 0, 0, Snapshot(), 30, {}, seed=0), None)
