"""A run that ended, or still goes on, read from what it left on the disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytrain.checkpoint import CheckpointStore, Manifest, load, read_manifest, step_name
from raytrain.errors import CheckpointError
from raytrain.evaluation import evaluate
from raytrain.kinds import Result
from raytrain.recipe import read_toml
from raytrain.replica import load_model
from raytrain.rundir import Failure, RunDirectory, rows
from raytrain.sync.exchange import ExactExchange
from raytrain.sync.transport import LocalTransport
from raytrain.train_recipe import TrainRecipe
from raytrain.worker import build, task_of


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
    except CheckpointError as damaged:
        return Result("failed", restarts=restarts, error=error or str(damaged))
    if last is None:
        return Result("failed" if failure else "interrupted", restarts=restarts, error=error)
    progress = last.progress
    ended = progress["status"] in ("done", "stopped early") and not failure
    task = task_of(recipe)
    best = {"metric": task.metric, "value": progress["best"], "step": progress["best_step"]}
    return Result(
        status=progress["status"] if ended else "failed" if failure else "interrupted",
        metrics=next((row["valid"] for row in reversed(rows(run.metrics)) if "valid" in row), {}),
        best=best if progress["best_step"] else {},
        references=task.references() if ended else {},
        steps=progress["step"],
        samples=progress["position"],
        seconds=round(progress["seconds"], 3),
        stalled_seconds=round(progress["stalled_seconds"], 3),
        bytes_sent=progress["bytes_sent"],
        restarts=restarts,
        checkpoint=str(last.path),
        error=error,
    )


def evaluate_run(folder: Path, overrides: Mapping[str, Any]) -> dict[str, float]:
    """Return the held-out metrics of the best checkpoint of the run in `folder`, measured in this process.

    Args:
        folder: the run's.
        overrides: changes to its recipe, such as other data.

    Raises:
        RecipeError: the changes do not fit the recipe.
        CheckpointError: there is no checkpoint yet, it is damaged, or the changes make another model.
    """
    run = RunDirectory(folder)
    raw, _ = read_toml(str(run.recipe), [])
    recipe = TrainRecipe.parse(raw).with_overrides(overrides)
    newest = _newest(run)
    if newest is None:
        raise CheckpointError(f"{folder}: there is no complete checkpoint yet")
    best = run.checkpoints / step_name(newest.progress["best_step"])
    path = best if best.is_dir() else newest.path
    exchange = ExactExchange(LocalTransport())
    task = task_of(recipe)
    replica = build(recipe, task, exchange)
    load_model(replica, load(path, 0), path, averaged=True)
    autocast = recipe.plan().autocast
    metrics = evaluate(task, replica.module, task.data("valid"), recipe.evaluation.batch, exchange, autocast=autocast)
    return {"step": read_manifest(path).step, **metrics}


def _newest(run: RunDirectory) -> Manifest | None:
    return CheckpointStore(run.checkpoints, 1, ExactExchange(LocalTransport())).newest()
