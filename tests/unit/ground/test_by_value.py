"""Objects that a recipe is given by value."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.by_value import PREFIX, check_importable, dump_objects, load_objects, name_objects
from raytrain.errors import RecipeError
from raytrain.registry import resolve
from raytrain.testing import tiny
from raytrain.training.recipe import TrainRecipe


def local(name: str = "callback") -> Callable[[Any], None]:
    def callback(replica: Any) -> None: ...

    callback.__name__ = name
    return callback


def recipe(**fields: Any) -> TrainRecipe:
    return TrainRecipe.parse({"kind": "train", "task": "raytrain.testing:tiny", **name_objects(fields)})


def test_what_a_module_defines_goes_by_its_name() -> None:
    named = name_objects({"task": tiny, "optimizer": {"name": torch.optim.SGD, "lr": 0.1}, "out": Path("x")})
    assert named == {
        "task": "raytrain.testing:tiny",
        "optimizer": {"name": "torch.optim.sgd:SGD", "lr": 0.1},
        "out": "x",
    }


def test_a_record_goes_by_the_name_in_the_module_of_its_functions(workplace: Path) -> None:
    functions = "def model(seed): ...\ndef data(split): ...\ndef losses(model, batch): ...\n"
    (workplace / "mine.py").write_text(
        f"from raytrain import Task\n{functions}circle = Task(model=model, data=data, losses=losses)\n"
    )
    assert name_objects(resolve({}, "mine:circle", "task.name")) == "mine:circle"


def test_what_no_module_defines_is_sent_and_names_differ() -> None:
    one, other = local(), local()
    sent = recipe(callbacks=[one, other, one])
    assert sent.callbacks == (f"{PREFIX}callback", f"{PREFIX}callback1", f"{PREFIX}callback")
    assert resolve({}, sent.callbacks[1], "callbacks") is other
    packed = dump_objects(sent)
    name_objects([local()])
    assert resolve({}, sent.callbacks[0], "callbacks") is not one, "a cell of a notebook that ran again"
    load_objects(packed)
    assert resolve({}, sent.callbacks[0], "callbacks").__code__ == one.__code__
    assert dump_objects(recipe()) == b""


def test_what_cannot_be_sent_or_imported_is_said() -> None:
    lock = threading.Lock()

    def locked(replica: Any) -> None:
        lock.acquire()

    with pytest.raises(RecipeError, match=r"callbacks.0: cannot be sent to the workers: TypeError: .*; define it in a"):
        dump_objects(recipe(callbacks=[locked]))
    with pytest.raises(RecipeError) as refused:
        check_importable(recipe(callbacks=[locked]), "an actor of Ray")
    assert str(refused.value) == (
        "callbacks.0: locked is not in a module, from which an actor of Ray can import it; define it in a file, and "
        "name it as module:attribute, as in mine:locked"
    )
    with pytest.raises(RecipeError, match="unknown: it was defined in the notebook or script that started the run, "):
        resolve({}, "raytrain.by_value:unknown", "task.name")
    with pytest.raises(RecipeError, match=r"objects given by value cannot be made in a worker: \w+: .*; define"):
        load_objects(b"not one")
