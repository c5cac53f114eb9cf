"""Supervision of workers by the command: progress, Ctrl-C, failures and the result."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from typing import Any, Protocol

from raytrain.errors import RecipeError, TrainingError
from raytrain.kinds import Order
from raytrain.run.directory import Failure, RunDirectory, RunSnapshot
from raytrain.run.progress import ProgressDisplay
from raytrain.run.result import Result
from raytrain.training.build import resolve_recipe
from raytrain.training.recipe import TrainRecipe
from raytrain.training.results import collect_result


class Workers(Protocol):
    """The running workers of a run.

    Attributes:
        ended: set when they have ended.
        error: why they failed, if they have not recorded a failure in the run's folder.
    """

    ended: threading.Event
    error: str

    def close(self) -> None:
        """Kill them, if they have not ended."""
        ...


class Backend(Protocol):
    """Where workers run: this machine, or a Ray cluster."""

    def check(self, recipe: TrainRecipe) -> None:
        """Check what can be known before anything is started.

        Raises:
            RecipeError: the workers do not fit, or nothing answers.
        """
        ...

    def session(self, recipe: TrainRecipe, say: Callable[[str], None]) -> AbstractContextManager[Any]:
        """Connect inside the `with` block, whose value is the CPU share of each worker.

        Args:
            recipe: to train.
            say: prints a line.

        Raises:
            RecipeError: no connection, or the workers do not fit.
        """
        ...

    def start(self, recipe: TrainRecipe, run: RunDirectory, share: Any) -> Workers:
        """Start the workers."""
        ...


def supervise(recipe: TrainRecipe, order: Order, backend: Backend) -> Result:
    """Run the workers of a recipe, and return the result, which is also written to the run's `result.json`.

    Ctrl-C asks the workers to checkpoint and end; a second one kills them.

    Raises:
        RecipeError: the recipe, the folder or the backend does not allow it.
        TrainingError: the run failed; what was computed is in its folder.
    """
    run_directory = RunDirectory(order.out.absolute())
    recipe, _ = resolve_recipe(recipe, run_directory)  # its errors are better here than in a worker
    backend.check(recipe)
    with run_directory.session(resume=order.resume), ProgressDisplay(run_directory, recipe.steps) as display:
        with backend.session(recipe, display.print) as share:
            before = run_directory.snapshot()
            run_directory.prepare(recipe.to_toml())
            with closing(backend.start(recipe, run_directory, share)) as workers:
                ended = display.follow(workers.ended)
        failure = _failure(run_directory, before, workers.error if ended else "")
        result = collect_result(recipe, run_directory, failure)
        try:
            run_directory.write_result(result)
        except OSError as error:
            display.print(f"{run_directory.result} could not be written: {error.strerror}")
        display.finish(result)
    if failure:
        kept = f"the last complete checkpoint is {result.checkpoint}" if result.checkpoint else "there is no checkpoint"
        raise TrainingError(f"{failure.trace}{failure.message}\n{kept}")
    return result


def _failure(run_directory: RunDirectory, before: RunSnapshot, error: str) -> Failure | None:
    """Return the failure of a run, if it failed.

    Args:
        run_directory: of the run.
        before: snapshot of the folder before the workers started.
        error: of the workers.

    Raises:
        RecipeError: it failed before there was any training.
        TrainingError: the folder is gone; or the run that was to be resumed is as it was, and so is its result.
    """
    if not run_directory.recipe.is_file():
        raise TrainingError(f"{run_directory.path} was removed or emptied while the run went on")
    failure, after = run_directory.failure() or (Failure(error) if error else None), run_directory.snapshot()
    if failure and failure.exit_status == RecipeError.exit_status and not after.has_trained_since(before):
        raise RecipeError(failure.message)
    if failure and before.checkpoints and after == before:
        raise TrainingError(failure.trace + failure.message)
    return failure
