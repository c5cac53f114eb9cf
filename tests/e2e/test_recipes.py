"""Every shipped recipe, for a few steps, and what the benchmark of fine-tuning makes of them."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from raytrain.overrides import merged
from raytrain.recipe import read_toml
from raytrain.rundir import rows
from raytrain.testing import train_here
from raytrain.train_recipe import KIND, TrainRecipe

SMALLER: dict[str, dict[str, Any]] = {
    "stdlib-lm": {"task.valid": 0.002, "task.block": 64, "task.stride": 32, "task.width": 32},
    "shakespeare-cpu": {"task.width": 32},
    "shakespeare-co2": {"task.width": 32},
    "sst2-minilm-zo": {"task.shots": 16},
}


def sentences(folder: Path) -> Path:
    """Write a file of a few sentences to measure on."""
    (folder / "few.tsv").write_text("a great film\t1\nan awful plot\t0\n")
    return folder / "few.tsv"


@pytest.mark.parametrize("name", sorted(file.stem for file in KIND.recipes.glob("*.toml")))
def test_recipes_train(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    changes = {"steps": 4, "evaluation.every": 2, "log.every": 1, "log.to": [], **SMALLER.get(name, {})}
    if name.startswith("shakespeare"):
        changes["task.path"] = str(request.getfixturevalue("shakespeare"))
    if name.startswith("sst2"):
        changes["task.path"] = str(request.getfixturevalue("sst2"))
        changes["task.held_out"] = str(sentences(tmp_path))
    raw, _ = read_toml(name, [KIND.recipes])
    run = train_here(TrainRecipe.parse(merged(raw, changes)), tmp_path / "run")
    assert run.failure() is None
    log = rows(run.metrics)
    assert [row["step"] for row in log] == [1, 2, 2, 3, 4, 4]
    assert log[0]["loss"] * (-1 if name == "sst2-minilm-zo" else 1) > 0, "it lowers minus a probability"
    assert log[-1]["valid"]["loss"] > 0


def test_what_the_benchmark_compares_are_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes an hour or more, and should not end in a typing error after those before it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmark"))
    finetune = importlib.import_module("finetune")
    for recipe, changes in finetune.METHODS.values():
        assert finetune.changed(recipe, changes).name == recipe
