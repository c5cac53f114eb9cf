"""Training of a recipe on a backend: processes of this machine, or a Ray cluster."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from raytrain.kinds import RunOptions
from raytrain.launch.supervise import Joined, supervise
from raytrain.run.directory import RunDirectory
from raytrain.run.progress import ProgressDisplay, Wording
from raytrain.run.result import Result
from raytrain.training.build import resolve_recipe
from raytrain.training.recipe import TrainRecipe
from raytrain.training.results import collect_result


def columns(row: Mapping[str, Any]) -> list[str]:
    """Return what is shown of a row of training, beside its evaluations and its pace."""
    return [f"loss {row['loss']:.4f}"] if "loss" in row else []


WORDING = Wording("train", "training", "step", "the workers save and end after the step they are at", columns)


class Backend(Protocol):
    """Where workers train: this machine, or a Ray cluster."""

    def check(self, recipe: TrainRecipe) -> None:
        """Check what can be known before anything is started.

        Raises:
            RecipeError: the workers do not fit, or nothing answers.
        """
        ...

    def session(self, recipe: TrainRecipe, run: RunDirectory, say: Callable[[str], None]) -> Joined:
        """Hold the machines inside the `with` block, whose value starts the workers.

        Args:
            recipe: what is to be trained.
            run: where it is recorded.
            say: shows a line to the user.

        Raises:
            RecipeError: it cannot be joined, or the workers do not fit.
        """
        ...


def train_on(backend: Backend, recipe: TrainRecipe, order: RunOptions) -> Result:
    """Train, and return how it ended.

    Raises:
        RaytrainError: as `supervise`.
    """
    run = RunDirectory(order.out.absolute())
    recipe, _ = resolve_recipe(recipe, run)  # its errors are better here than in a worker
    backend.check(recipe)
    return supervise(
        run,
        recipe.to_toml(),
        partial(backend.session, recipe, run),
        ProgressDisplay(run, recipe.steps, WORDING),
        partial(collect_result, recipe, run),
        resume=order.resume,
    )
