"""Predicts for the examples of a file with a trained model, on Ray: one of the few files that know it."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util import ActorPool

from raytrain.cluster import check_reachable, cpus_per_worker
from raytrain.errors import RaytrainError, RecipeError, TrainingError
from raytrain.finished import best_of, recipe_of
from raytrain.launch import OWN, joined, machines_here
from raytrain.names import place_of
from raytrain.task import Examples, Task
from raytrain.train_recipe import TrainRecipe
from raytrain.worker import plan_of, task_of


def predict_file(folder: Path, overrides: Mapping[str, Any], source: Path, target: Path, address: str | None) -> int:
    """Predict for each example of a file with the best checkpoint of a run, on as many workers as the run has.

    Args:
        folder: the run's; workers on all machines must see it, and `source`.
        overrides: changes to its recipe.
        source: what the task reads examples without labels from.
        target: where one line of JSON goes for each example, in their order; it is complete afterwards, or as it was.
        address: of a running Ray cluster; None or "local": start Ray on this machine.

    Returns:
        How many lines were written.

    Raises:
        RecipeError: the task cannot predict, or a file or the cluster does not allow it.
        TrainingError: a prediction failed.
    """
    recipe = recipe_of(folder, overrides)
    count = len(_inputs(recipe, task_of(recipe), source))
    address = None if address == OWN else address
    if address is not None:
        check_reachable(address)
    elif not ray.is_initialized():
        cpus_per_worker(machines_here(recipe), recipe.workers, recipe.resources.cpus)
    aside = target.absolute().with_name(f".{target.name}.partial")
    try:
        with aside.open("w", encoding="utf-8") as lines, joined(address, recipe) as machines:
            cpus = cpus_per_worker(machines, recipe.workers, recipe.resources.cpus)
            for line in _lines(recipe, cpus, count, (folder.absolute(), dict(overrides), source.absolute())):
                lines.write(line + "\n")
        aside.replace(target)
    except OSError as error:
        raise RecipeError(f"--output: cannot write {target}: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)
    return count


def _inputs(recipe: TrainRecipe, task: Task, source: Path) -> Examples:
    if task.inputs is None or task.predict is None:
        raise RecipeError(
            f"task.name: {recipe.task.name} cannot predict from a file: its Task has no `inputs` and `predict`"
        )
    try:
        return task.inputs(source)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"--input: {source}: {type(error).__name__}: {error}{place_of(error)}") from error


def _lines(recipe: TrainRecipe, cpus: float, count: int, model: tuple[Path, dict[str, Any], Path]) -> Iterator[str]:
    """Yield what is predicted, in order, as JSON."""
    batch, resources = recipe.evaluation.batch, recipe.resources
    workers = min(recipe.workers, math.ceil(count / batch))
    where = {"resources": resources.custom, "label_selector": resources.labels or None}
    kind = ray.remote(num_cpus=cpus, num_gpus=resources.gpus, **where)(_Predictor)
    pool = ActorPool([kind.remote(*model, max(1, int(cpus)), os.getcwd()) for _ in range(workers)])
    ranges = [(start, min(start + batch, count)) for start in range(0, count, batch)]
    try:
        for lines in pool.map(lambda worker, part: worker.lines.remote(*part), ranges):
            yield from lines
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, RaytrainError):
            raise cause from None
        raise TrainingError(f"predicting failed on a worker: {type(cause).__name__}: {cause}") from error


class _Predictor:
    """The model, on one of the workers."""

    def __init__(self, folder: Path, overrides: dict[str, Any], source: Path, threads: int, import_from: str) -> None:
        sys.path.append(import_from)
        torch.set_num_threads(threads)
        best = best_of(folder, overrides)
        self._task = best.task
        self._autocast = plan_of(best.recipe).autocast
        self._device = torch.device("cuda" if best.recipe.resources.gpus else "cpu")
        self._module = best.replica.module.to(self._device).eval()
        self._examples = _inputs(best.recipe, best.task, source)

    def lines(self, start: int, stop: int) -> list[str]:
        """Return the predictions for the examples from `start` to `stop`, as lines of JSON."""
        examples = [self._examples[index] for index in range(start, stop)]
        with torch.no_grad(), torch.autocast(self._device.type, dtype=self._autocast, enabled=bool(self._autocast)):
            predicted = self._task.predict(self._module, examples) if self._task.predict else []
        if len(predicted) != len(examples):
            raise TrainingError(f"Task.predict returned {len(predicted)} predictions for {len(examples)} examples")
        return [json.dumps(each, ensure_ascii=False) for each in predicted]
