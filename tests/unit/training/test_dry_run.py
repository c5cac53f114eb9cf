"""A dry run, epochs, and the list of runs."""

import re
from pathlib import Path
from typing import Any

import pytest

from raytrain.errors import RecipeError
from raytrain.run.directory import RunDirectory
from raytrain.run.listing import list_runs
from raytrain.run.result import Result
from raytrain.testing import train_here
from raytrain.training.build import resolve_recipe
from raytrain.training.dry_run import dry_run
from raytrain.training.recipe import TrainRecipe

TINY = {"kind": "train", "task": "raytrain.testing:tiny", "batch": 4, "log": {"loggers": []}}


def recipe(**fields: Any) -> TrainRecipe:
    return TrainRecipe.parse({**TINY, **fields})


@pytest.fixture
def endless(workplace: Path) -> dict[str, str]:
    (workplace / "mine.py").write_text("def simulate(seed):\n    yield seed\n")
    return {"name": "raytrain.testing:tiny", "source": "mine:simulate"}


@pytest.mark.parametrize(
    ("fields", "activations"),
    [
        ({}, True),
        ({"workers": 2, "sync": "fsdp"}, True),
        ({"optimizer": "zo-sgd"}, False),
        ({"task": {"name": "raytrain.testing:tiny", "source": "ray"}, "sync": "cocod"}, True),
    ],
)
def test_a_dry_run_tells_what_a_step_takes(fields: dict[str, Any], activations: bool, tmp_path: Path) -> None:
    told = recipe(accumulate=2, steps=25, **fields)
    data, model, batch, step, loss, memory = dry_run(told)
    assert data == f"data: 50 examples to train on, 13 held out; 25 steps are {4 * told.workers:g} epochs"
    assert model == "model: 61 parameters, of which 21 are trained"
    assert batch == "batch: x (4, 4) float32, y (4,) float32, weight (4,) float32"
    assert step == f"step: 8 examples, 8 losses on each of {told.workers} worker(s)"
    assert re.fullmatch(r"loss: \d+\.\d{4}; the first step took \d+\.\d\d s here", loss)
    assert memory.startswith("memory of a worker, estimated: 0.0 MiB (parameters 0.0 MiB, gradients 0.0 MiB, optim")


def test_activations_grow_with_the_batch_and_not_without_gradients() -> None:
    def activations(**fields: Any) -> float:
        told = TrainRecipe.parse({"kind": "train", "task": {"name": "digits", "widths": [8]}, **fields})
        *_, memory = dry_run(told)
        return float(re.search(r"activations (\S+) MiB", memory)[1])

    assert activations(batch=512) == pytest.approx(4 * activations(batch=128), rel=0.1)
    assert activations(batch=512, accumulate=2) == activations(batch=512)
    assert activations(batch=512, optimizer="zo-sgd") == 0


def test_a_dry_run_starts_no_actors(endless: dict[str, str]) -> None:
    told = recipe(task=endless)
    with pytest.raises(RecipeError, match=r"task.source.name: mine:simulate makes examples in actors, wh"):
        list(dry_run(told))


@pytest.mark.parametrize(("epochs", "workers", "steps"), [(1, 1, 13), (2.5, 1, 32), (3, 2, 19), (0.01, 1, 1)])
def test_epochs_become_steps_when_the_run_starts(tmp_path: Path, epochs: float, workers: int, steps: int) -> None:
    told, _ = resolve_recipe(recipe(epochs=epochs, workers=workers), RunDirectory(tmp_path))
    assert (told.steps, told.epochs) == (steps, 0)
    assert told.with_overrides({"epochs": 2 * epochs}).epochs == 2 * epochs
    assert recipe(epochs=3).with_overrides({"steps": 7}).epochs == 0


def test_a_schedule_is_named_in_short() -> None:
    told = recipe(schedule={"warmup": 5}).with_overrides({"schedule": "wsd"})
    assert (told.schedule.name, told.schedule.warmup) == ("wsd", 5)
    assert recipe(schedule="constant").with_overrides({"schedule.warmup": 3}).schedule.name == "constant"
    with pytest.raises(RecipeError, match=r"schedule.name: no such name 'cosin'; did you mean cosine\?"):
        recipe(schedule="cosin")


def test_epochs_need_a_number_of_examples_and_no_phases(tmp_path: Path, endless: dict[str, str]) -> None:
    told = recipe(epochs=1, task=endless)
    with pytest.raises(RecipeError, match="epochs: mine:simulate makes examples without end; set steps"):
        resolve_recipe(told, RunDirectory(tmp_path))
    with pytest.raises(RecipeError, match="epochs: expected 0 with phases, which begin at steps; got 1; set steps"):
        recipe(epochs=1, phases=[{"from": 2, "batch": 2}])


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    for name in ("first", "second", "third"):
        run = train_here(recipe(steps=4), tmp_path / name)
    (tmp_path / "no-run").mkdir()
    RunDirectory(tmp_path / "first").write_result(
        Result("stopped early", best={"metric": "loss", "value": 0.5, "step": 2})
    )
    with run.locked("command", 0):
        third, second, first = list_runs(tmp_path)
    assert [each.folder.name for each in (third, second, first)] == ["third", "second", "first"]
    assert [each.status for each in (third, second, first)] == ["running", "killed", "stopped early"]
    assert (first.kind, first.best["step"], second.best["step"]) == ("train", 2, 4)
    assert list_runs(tmp_path)[0].status == "killed"
    for best in ('{"value": 1}', '{"metric": "loss", "step": 1, "value": 1' + "0" * 400 + "}"):
        (tmp_path / "second" / "result.json").write_text(f'{{"status": "done", "best": {best}}}')
        assert [(each.status, each.best.get("step")) for each in list_runs(tmp_path)] == [
            ("killed", 4),
            ("damaged", 4),
            ("stopped early", 2),
        ]
    with pytest.raises(RecipeError, match="FOLDER: nowhere does not exist; runs are in runs/, or where --out put them"):
        list_runs(Path("nowhere"))
