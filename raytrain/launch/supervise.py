"""What the command does while a run of any kind goes on: it shows progress, asks the run to end, and reports."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from typing import Protocol

from raytrain.errors import RecipeError, TrainingError
from raytrain.run.directory import Failure, RunDirectory, RunSnapshot
from raytrain.run.progress import ProgressDisplay
from raytrain.run.result import Result


class Workers(Protocol):
    """What computes a run, while it does: a thread or processes.

    They call `RunDirectory.announce` when they begin. Until then, Ctrl-C ends a new run as if it had not begun.

    Attributes:
        ended: set when they have ended.
        error: why they failed, if they have not recorded a failure in the run's folder.
    """

    ended: threading.Event
    error: str

    def close(self) -> None:
        """Kill them, if they have not ended."""
        ...


Joined = AbstractContextManager[Callable[[], Workers]]
"""Where workers compute, from which they are started: inside the `with` block, this process is in a cluster."""


def supervise(
    run: RunDirectory,
    recipe: str,
    join: Callable[[Callable[[str], None]], Joined],
    display: ProgressDisplay,
    result_of: Callable[[Failure | None], Result],
    *,
    resume: bool,
) -> Result:
    """Run a recipe of any kind, and return how it ended; the same is in the run's `result.json`.

    Ctrl-C asks the workers to save and end, by `RunDirectory.stop_requested`; a second one ends them at once.

    Args:
        run: the run's folder.
        recipe: TOML, to leave in the folder.
        join: (shows a line to the user) -> where the workers compute.
        display: shows progress.
        result_of: (what failed, if anything did) -> how the run ended.
        resume: go on with the run in the folder.

    Raises:
        RecipeError: the recipe, the folder or what is joined does not allow it.
        TrainingError: the run failed; what was computed is in its folder.
    """
    with run.session(resume=resume), display:
        with join(display.print) as start:
            before = run.snapshot()
            run.prepare(recipe)
            with closing(start()) as workers:
                ended = display.follow(workers.ended)
        failure = _failure(run, before, workers.error if ended else "")
        result = result_of(failure)
        try:
            run.write_result(result)
        except OSError as error:
            display.print(f"{run.result} could not be written: {error.strerror}")
        display.finish(result)
    if failure:
        kept = f"the last complete checkpoint is {result.checkpoint}" if result.checkpoint else "there is no checkpoint"
        raise TrainingError(f"{failure.trace}{failure.message}\n{kept}")
    return result


def _failure(run: RunDirectory, before: RunSnapshot, error: str) -> Failure | None:
    """Return what failed, if anything did.

    Args:
        run: the run's folder.
        before: what was there when it began.
        error: of the workers.

    Raises:
        RecipeError: it failed before anything was computed.
        TrainingError: the folder is gone; or the run that was to be resumed is as it was, and so is its result.
    """
    if not run.recipe.is_file():
        raise TrainingError(f"{run.path} was removed or emptied while the run went on")
    failure, after = run.failure() or (Failure(error) if error else None), run.snapshot()
    if failure and failure.exit_status == RecipeError.exit_status and not after.has_trained_since(before):
        raise RecipeError(failure.message)
    if failure and before.checkpoints and after == before:
        raise TrainingError(failure.trace + failure.message)
    return failure
