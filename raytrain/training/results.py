"""A run that ended, or still goes on, read from what it left on the disk."""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from raytrain.errors import CheckpointError
from raytrain.recipe import read_toml
from raytrain.registry import error_location
from raytrain.run.checkpoint import CheckpointStore, Manifest, checkpoint_errors, load_part, read_manifest, step_name
from raytrain.run.directory import Failure, RunDirectory
from raytrain.run.result import Result
from raytrain.run.rows import read_jsonl
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.task import Task
from raytrain.tensors import autocast_type
from raytrain.training.build import build_replica, build_task
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import load_model, progress_from_dict
from raytrain.training.trained_model import TrainedModel


def collect_result(recipe: TrainRecipe, run: RunDirectory, failure: Failure | None) -> Result:
    """Return the result of the run in `run`.

    Args:
        recipe: what was run.
        run: the folder.
        failure: why the attempt ended, if it did not end well.
    """
    error = failure.message if failure else ""
    restarts = len(read_jsonl(run.restarts))
    try:
        last = _newest(run)
        if last is None:
            return Result("failed" if failure else "interrupted", restarts=restarts, error=error)
        progress = progress_from_dict(last.progress, last.path)
    except CheckpointError as damaged:
        return Result("failed", restarts=restarts, error=error or str(damaged))
    status = "failed" if failure else "interrupted" if progress.status == "running" else progress.status
    ended = status in ("done", "stopped early")
    task = build_task(recipe)
    best = {"metric": task.metric, "value": progress.best, "step": progress.best_step}
    return Result(
        status=status,
        metrics=next((row["valid"] for row in reversed(read_jsonl(run.metrics)) if "valid" in row), {}),
        best=best if progress.best_step else {},
        references=_references(task) if ended else {},
        figures={"steps": progress.step, "samples": progress.position, **progress.costs()},
        seconds=round(progress.seconds, 3),
        restarts=restarts,
        checkpoint=str(last.path),
        error=error,
    )


def _references(task: Task) -> Mapping[str, float]:
    """Return what the task compares itself with; the user's code may fail there, and the run is done all the same."""
    try:
        return task.references()
    except Exception as error:
        print(
            f"raytrain: Task.references failed: {type(error).__name__}: {error}{error_location(error)}", file=sys.stderr
        )
        return {}


def load_recipe(folder: Path, overrides: Mapping[str, Any]) -> TrainRecipe:
    """Return the recipe of the run in `folder`, with changes.

    Raises:
        RecipeError: the changes do not fit it.
    """
    raw, _ = read_toml(str(RunDirectory(folder).recipe), [])
    return TrainRecipe.parse(raw).with_overrides(overrides)


def load_best(folder: Path, overrides: Mapping[str, Any]) -> TrainedModel:
    """Load the best checkpoint of the run in `folder`.

    Args:
        folder: the run's.
        overrides: changes to its recipe, such as other data, all of which is then held out.

    Raises:
        RecipeError: the changes do not fit the recipe.
        CheckpointError: there is no checkpoint yet, it is damaged, or the changes make another model.
    """
    run = RunDirectory(folder)
    changed = load_recipe(folder, overrides).task.for_evaluation(load_recipe(folder, {}).task)
    recipe = load_recipe(folder, {f"task.{name}": value for name, value in changed.items()} | dict(overrides))
    newest = _newest(run)
    if newest is None:
        raise CheckpointError(f"{folder}: there is no complete checkpoint yet")
    best = run.checkpoints / step_name(newest.progress["best_step"])
    path = best if best.is_dir() else newest.path
    step = read_manifest(path).step
    recipe = next(stage.recipe for stage in reversed(recipe.stages()) if stage.begin < max(step, 1))
    task = build_task(recipe)
    return TrainedModel(
        task,
        task_name=recipe.task.name,
        step=step,
        module=partial(_module, recipe, task, path),
        adapted=recipe.adapter.name != "none",
        batch=recipe.evaluation.batch,
        autocast=autocast_type(recipe.precision),
        workers=recipe.workers,
        resources=recipe.resources,
    )


def _module(recipe: TrainRecipe, task: Task, checkpoint: Path) -> nn.Module:
    replica = build_replica(recipe, task, ExactAverager(LocalTransport()), init_head=False)
    with checkpoint_errors(checkpoint):
        load_model(replica, load_part(checkpoint, 0), checkpoint, averaged=True)
    return replica.module


def _newest(run: RunDirectory) -> Manifest | None:
    return CheckpointStore(run.checkpoints, 1, ExactAverager(LocalTransport())).newest()
