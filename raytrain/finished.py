"""A run that ended, or still goes on, read from what it left on the disk."""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain.checkpoint import CheckpointStore, Manifest, load, read_manifest, reading, step_name
from raytrain.errors import CheckpointError, RecipeError
from raytrain.evaluation import evaluate
from raytrain.kinds import Result
from raytrain.model.adapters import merge
from raytrain.names import place_of
from raytrain.recipe import read_toml
from raytrain.replica import Replica, load_model, progress_from
from raytrain.rundir import Failure, RunDirectory, rows
from raytrain.sync.exchange import ExactExchange
from raytrain.sync.transport import LocalTransport
from raytrain.task import Task
from raytrain.train_recipe import TrainRecipe
from raytrain.worker import build, plan_of, task_of


def result_of(recipe: TrainRecipe, run: RunDirectory, failure: Failure | None) -> Result:
    """Return the result of the run in `run`.

    Args:
        recipe: what was run.
        run: the folder.
        failure: why the attempt ended, if it did not end well.
    """
    error = failure.message if failure else ""
    restarts = len(rows(run.restarts))
    try:
        last = _newest(run)
        if last is None:
            return Result("failed" if failure else "interrupted", restarts=restarts, error=error)
        progress = progress_from(last.progress, last.path)
    except CheckpointError as damaged:
        return Result("failed", restarts=restarts, error=error or str(damaged))
    status = "failed" if failure else "interrupted" if progress.status == "running" else progress.status
    ended = status in ("done", "stopped early")
    task = task_of(recipe)
    best = {"metric": task.metric, "value": progress.best, "step": progress.best_step}
    return Result(
        status=status,
        metrics=next((row["valid"] for row in reversed(rows(run.metrics)) if "valid" in row), {}),
        best=best if progress.best_step else {},
        references=_references(task) if ended else {},
        steps=progress.step,
        samples=progress.position,
        seconds=round(progress.seconds, 3),
        stalled_seconds=round(progress.stalled_seconds, 3),
        bytes_sent=progress.bytes_sent,
        exchange_seconds=round(progress.exchange_seconds, 3),
        hidden_share=round(_hidden(progress.exchange_seconds, progress.waited_seconds), 4),
        restarts=restarts,
        checkpoint=str(last.path),
        error=error,
    )


def _hidden(exchange_seconds: float, waited_seconds: float) -> float:
    return max(0.0, 1 - waited_seconds / exchange_seconds) if exchange_seconds else 0.0


def _references(task: Task) -> Mapping[str, float]:
    """Return what the task compares itself with; the user's code may fail there, and the run is done all the same."""
    try:
        return task.references()
    except Exception as error:
        print(f"raytrain: Task.references failed: {type(error).__name__}: {error}{place_of(error)}", file=sys.stderr)
        return {}


@dataclass(frozen=True, slots=True)
class Best:
    """The best checkpoint of a run, as something that can be used.

    Attributes:
        recipe: of the run, with changes.
        task: what it was trained on.
        replica: holds the model, with the averaged weights if there are any.
        path: of the checkpoint.
    """

    recipe: TrainRecipe
    task: Task
    replica: Replica
    path: Path


def recipe_of(folder: Path, overrides: Mapping[str, Any]) -> TrainRecipe:
    """Return the recipe of the run in `folder`, with changes.

    Raises:
        RecipeError: the changes do not fit it.
    """
    raw, _ = read_toml(str(RunDirectory(folder).recipe), [])
    return TrainRecipe.parse(raw).with_overrides(overrides)


def best_of(folder: Path, overrides: Mapping[str, Any]) -> Best:
    """Return the best checkpoint of the run in `folder`, in this process.

    Args:
        folder: the run's.
        overrides: changes to its recipe, such as other data.

    Raises:
        RecipeError: the changes do not fit the recipe.
        CheckpointError: there is no checkpoint yet, it is damaged, or the changes make another model.
    """
    run, recipe = RunDirectory(folder), recipe_of(folder, overrides)
    newest = _newest(run)
    if newest is None:
        raise CheckpointError(f"{folder}: there is no complete checkpoint yet")
    best = run.checkpoints / step_name(newest.progress["best_step"])
    path = best if best.is_dir() else newest.path
    task = task_of(recipe)
    replica = build(recipe, task, ExactExchange(LocalTransport()), start=False)
    with reading(path):
        load_model(replica, load(path, 0), path, averaged=True)
    return Best(recipe, task, replica, path)


def evaluate_run(folder: Path, overrides: Mapping[str, Any]) -> dict[str, float]:
    """Return the held-out metrics of the best checkpoint of a run, measured in this process.

    Args:
        folder: the run's.
        overrides: changes to its recipe; of data at another place, all is held out.

    Raises:
        RaytrainError: as `best_of`.
    """
    changed = recipe_of(folder, overrides).task.on_other_data(recipe_of(folder, {}).task)
    best = best_of(folder, {f"task.{name}": value for name, value in changed.items()} | dict(overrides))
    task, module, exchange = best.task, best.replica.module, ExactExchange(LocalTransport())
    autocast = plan_of(best.recipe).autocast
    metrics = evaluate(task, module, task.data("valid"), best.recipe.evaluation.batch, exchange, autocast=autocast)
    return {"step": read_manifest(best.path).step, **metrics}


def export_run(folder: Path, overrides: Mapping[str, Any], target: Path) -> None:
    """Write the best model of a run as a folder that Hugging Face's `from_pretrained` reads, adapters worked in.

    Args:
        folder: the run's.
        overrides: changes to its recipe.
        target: a folder that does not exist or is empty; it is complete afterwards, or as it was.

    Raises:
        RaytrainError: as `best_of`; the task's model has no such form, or the folder is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RecipeError(f"DIR: {target} exists and is not an empty folder; name another")
    best = best_of(folder, overrides)
    if best.task.export is None:
        raise RecipeError(f"task.name: the model of {best.recipe.task.name} has no form to export: Task.export is None")
    if best.recipe.adapter.name != "none":
        merge(best.replica.module)
    aside = target.absolute().with_name(f".{target.absolute().name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        best.task.export(best.replica.module.eval(), aside)
        aside.rename(target)
    except OSError as error:
        raise RecipeError(f"DIR: cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _newest(run: RunDirectory) -> Manifest | None:
    return CheckpointStore(run.checkpoints, 1, ExactExchange(LocalTransport())).newest()
