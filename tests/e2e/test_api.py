"""The package's functions in programs of a user's own."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import raytrain
from raytrain import api

NOTEBOOK = """
import torch
from torch import nn
from raytrain import Task, evaluate, load, train

class Line(nn.Linear):
    pass

def model(seed):
    torch.manual_seed(seed)
    return Line(2, 2)

def data(split):
    points = torch.randn(64, 2, generator=torch.Generator().manual_seed(len(split)))
    return [(point, (point.sum() > 0).long()) for point in points]

class Descent(torch.optim.SGD):
    pass

def count(replica):
    count.steps = replica.progress.step

task = Task(
    model=model,
    data=data,
    losses=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"),
)
result = train(task, steps=20, workers=2, out="run", optimizer={"name": Descent, "lr": 0.5}, callbacks=[count],
               resources={"cpus": 0.5}, log={"loggers": []})
model = load(result).module()
print(type(model) is Line, evaluate(result) == {"step": 20, **result.metrics})
"""


@pytest.mark.parametrize("name", ["train", "search", "federate", "load", "evaluate"])
def test_examples_in_docstrings_run(request: pytest.FixtureRequest, ray_cluster: None, name: str) -> None:
    names = {"getfixture": request.getfixturevalue, "torch": torch, **vars(api)}
    [example] = doctest.DocTestFinder(recurse=False).find(getattr(raytrain, name), name, globs=names)
    result = doctest.DocTestRunner().run(example)
    assert (result.failed, result.attempted > 0) == (0, True)


def test_a_notebook_defines_trains_and_loads_on_two_workers(workplace: Path) -> None:
    """What it defines is in no file, and it has no `if __name__ == "__main__"`."""
    ended = subprocess.run(
        [sys.executable, "-"], input=NOTEBOOK, cwd=workplace, capture_output=True, text=True, check=False
    )
    assert ended.stdout == "True True\n", ended.stderr
    with pytest.raises(raytrain.RecipeError, match="it was defined in the notebook or script that started"):
        raytrain.load("run")


def test_workers_of_a_ray_cluster_take_objects_by_value_and_actors_refuse_them(
    ray_cluster: None, workplace: Path
) -> None:
    defined = {"__name__": "__main__"}
    exec(NOTEBOOK.partition("result = ")[0], defined)
    fields = {"steps": 4, "optimizer": {"name": defined["Descent"]}, "log": {"loggers": []}}
    assert raytrain.train(defined["task"], out="run", address="local", **fields).status == "done"
    with pytest.raises(raytrain.RecipeError, match=r"task.name: task is not in a module, from which an actor that "):
        raytrain.train(defined["task"], out="other", task={"source": "ray"}, **fields)
    with pytest.raises(raytrain.RecipeError, match=r"base.callbacks.0: count is not in a module, from wh"):
        raytrain.search("digits-pbt", base={"callbacks": [defined["count"]]})
    assert not (workplace / "other").exists()
