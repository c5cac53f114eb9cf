"""The options `task.source`, which every task has."""

from pathlib import Path
from typing import Any

import pytest

from raytrain.data.source import GeneratorSource, LocalSource, RayDataSource
from raytrain.errors import RecipeError
from raytrain.training.recipe import TrainRecipe

MINE = """
from torch import nn
from raytrain import Options, Task

plain = Task(model=lambda seed: nn.Linear(1, 1), data=lambda split: [], losses=lambda model, batch: None)

class Size(Options):
    size: int = 3

def sized(options: Size):
    return plain

class Named(Options):
    source: str = "wikipedia"

def clash(options: Named):
    return plain

class Speed(Options):
    speed: float = 1.0

def simulate(seed, options: Speed):
    yield options.speed

class Simulator:
    def __init__(self, seed):
        self.seed = seed

    def __iter__(self):
        yield self.seed

def no_seed():
    yield 0

class Clash(Options):
    actors: str = "Hepburn"

def cast(seed, options: Clash):
    yield 0
"""


@pytest.fixture(autouse=True)
def mine(workplace: Path) -> None:
    (workplace / "mine.py").write_text(MINE)


def recipe(task: Any, **changes: Any) -> TrainRecipe:
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    return TrainRecipe.parse({"kind": "train", "task": task}).with_overrides(fields)


@pytest.mark.parametrize("task", ["digits", "mine:plain", "mine:sized", {"name": "mine:sized", "size": 4}])
def test_every_task_has_a_source(task: Any) -> None:
    assert recipe(task).task.source == LocalSource(name="local")
    assert recipe(task, task__source="ray").task.source == RayDataSource(name="ray")
    chosen = recipe(task, task__source="ray", task__source__actors=3)
    assert chosen.task.source == RayDataSource(name="ray", actors=3)
    assert TrainRecipe.parse(chosen.to_dict()) == chosen
    assert recipe(task, task__source__name="mine:Simulator").task.source == GeneratorSource(name="mine:Simulator")


def test_a_generator_can_have_options_of_its_own() -> None:
    source = recipe("digits", task__source="mine:simulate", task__source__speed=2, task__source__prefetch=9).task.source
    assert isinstance(source, GeneratorSource)
    assert source.model_dump() == {"name": "mine:simulate", "actors": 0, "cpus": 1, "prefetch": 9, "speed": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task__source": "rya"},
            r"^task\.source\.name: no such name 'rya'; did you mean ray\? known: local, ray, or you",
        ),
        ({"task__source__actors": 2}, r"^task\.source\.actors: no such field; known: name$"),
        (
            {"task__source": "mine:no_seed"},
            r"^task\.source\.name: expected local, ray, or a function seed -> iterator of ",
        ),
        ({"task__source": "mine:nothing"}, r"^task\.source\.name: 'mine' has no 'nothing'"),
        (
            {"task__source": "mine:cast"},
            r"^task\.source\.name: mine:Clash has a field 'actors', which GeneratorSource has already; give ",
        ),
        (
            {"task__name": "mine:clash"},
            r"^task\.name: mine:Named has a field 'source', which TaskOptions has already; give it ",
        ),
        ({"task__source": {"name": "ray", "cpus": 0}}, r"^task\.source\.cpus: expected greater than 0; got 0$"),
    ],
)
def test_errors_name_the_field_and_the_way_out(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe("digits", **changes)
