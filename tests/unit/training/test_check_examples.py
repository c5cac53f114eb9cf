"""What is wrong with examples is said before a Ray is started for them."""

from pathlib import Path
from typing import Any

import pytest

from raytrain.errors import RecipeError
from raytrain.kinds import RunOptions
from raytrain.launch.dispatch import run_training
from raytrain.training.build import build_task, check_examples
from raytrain.training.recipe import TrainRecipe

MINE = """
from raytrain import Task

def of(read):
    return Task(model=None, data=read, losses=None)

def open_missing(split):
    return open("nowhere.csv").readlines()

def ragged(split):
    return [{"x": object()}]

missing = of(open_missing)
empty = of(lambda split: [])
odd = of(ragged)
fine = of(lambda split: [1.0] if split == "valid" else [2.0, 3.0])
"""


def recipe(name: str, **fields: Any) -> TrainRecipe:
    return TrainRecipe.parse({"kind": "train", "task": {"name": f"mine:{name}", **fields}})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "missing",
            r"task.name: mine:missing cannot read the examples of the split 'train': FileNotFoundError: ",
        ),
        ("empty", r"task.name: mine:empty has no examples to train on: Task.data\('train'\) is empty"),
        (
            "odd",
            r"task.name: mine:odd cannot read the examples of the split 'train': TypeError: default",
        ),
    ],
)
def test_examples_that_cannot_be_read_start_no_ray(workplace: Path, name: str, message: str) -> None:
    (workplace / "mine.py").write_text(MINE)
    with pytest.raises(RecipeError, match=message):
        run_training(recipe(name), RunOptions(workplace / "run", address="local"))
    assert not (workplace / "run").exists()


def test_examples_that_can_be_read_pass_and_generated_ones_are_not_asked_for(workplace: Path) -> None:
    (workplace / "mine.py").write_text(f"{MINE}\ndef simulate(seed):\n    yield seed\n")
    check_examples(recipe("fine"), build_task(recipe("fine")))
    with pytest.raises(RecipeError, match="the split 'valid'"):
        check_examples(recipe("missing", source="mine:simulate"), build_task(recipe("missing")))
