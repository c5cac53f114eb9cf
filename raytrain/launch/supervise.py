"""What the command does while workers train, wherever they do: it shows progress, asks them to end, and reports."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from typing import Any, Protocol

from raytrain.errors import RecipeError, TrainingError
from raytrain.kinds import RunOptions
from raytrain.run.directory import Failure, RunDirectory, Trace
from raytrain.run.progress import Display
from raytrain.run.result import Result
from raytrain.training.build import settled
from raytrain.training.recipe import TrainRecipe
from raytrain.training.results import result_of


class Workers(Protocol):
    """The workers of a run, while they train.

    Attributes:
        ended: set when they have ended.
        error: why they did, if it was not well and they have not left word of it in the run's folder.
    """

    ended: threading.Event
    error: str

    def close(self) -> None:
        """End them at once, if they have not ended."""
        ...


class Place(Protocol):
    """Where workers train: this machine, or a Ray cluster."""

    def check(self, recipe: TrainRecipe) -> None:
        """Check what can be known before anything is started.

        Raises:
            RecipeError: the workers do not fit, or nothing answers.
        """
        ...

    def joined(self, recipe: TrainRecipe, say: Callable[[str], None]) -> AbstractContextManager[Any]:
        """Be there inside the `with` block, whose value is each worker's share of the processors.

        Args:
            recipe: what is to be trained.
            say: shows a line to the user.

        Raises:
            RecipeError: it cannot be joined, or the workers do not fit.
        """
        ...

    def start(self, recipe: TrainRecipe, run: RunDirectory, share: Any) -> Workers:
        """Start the workers."""
        ...


def supervise(recipe: TrainRecipe, order: RunOptions, place: Place) -> Result:
    """Train, and return how it ended; the same is in the run's `result.json`.

    Ctrl-C asks the workers to save and end; a second one ends them at once.

    Raises:
        RecipeError: the recipe, the folder or the place does not allow it.
        TrainingError: the run failed; what was computed is in its folder.
    """
    run_directory = RunDirectory(order.out.absolute())
    recipe, _ = settled(recipe, run_directory)  # its errors are better here than in a worker
    place.check(recipe)
    with run_directory.opened(resume=order.resume), Display(run_directory, recipe.steps) as display:
        with place.joined(recipe, display.say) as share:
            before = run_directory.trace()
            run_directory.begin(recipe.to_toml())
            with closing(place.start(recipe, run_directory, share)) as workers:
                ended = display.follow(workers.ended)
        failure = _failure(run_directory, before, workers.error if ended else "")
        result = result_of(recipe, run_directory, failure)
        try:
            run_directory.write_result(result)
        except OSError as error:
            display.say(f"{run_directory.result} could not be written: {error.strerror}")
        display.finish(result)
    if failure:
        kept = f"the last complete checkpoint is {result.checkpoint}" if result.checkpoint else "there is no checkpoint"
        raise TrainingError(f"{failure.trace}{failure.message}\n{kept}")
    return result


def _failure(run_directory: RunDirectory, before: Trace, error: str) -> Failure | None:
    """Return what failed, if anything did.

    Args:
        run_directory: the run's.
        before: what was there when it began.
        error: of the workers.

    Raises:
        RecipeError: it failed before there was any training.
        TrainingError: the folder is gone; or the run that was to be resumed is as it was, and so is its result.
    """
    if not run_directory.recipe.is_file():
        raise TrainingError(f"{run_directory.path} was removed or emptied while the run went on")
    failure, after = run_directory.failure() or (Failure(error) if error else None), run_directory.trace()
    if failure and failure.exit_status == RecipeError.exit_status and not after.trained(before):
        raise RecipeError(failure.message)
    if failure and before.checkpoints and after == before:
        raise TrainingError(failure.trace + failure.message)
    return failure
