"""Chooses where a recipe trains: on this machine, or on a Ray cluster. What that takes is imported when it is known."""

from raytrain.data.source import ActorSource
from raytrain.kinds import RunOptions
from raytrain.launch import forkserver
from raytrain.run.result import Result
from raytrain.training.recipe import TrainRecipe


def run(recipe: TrainRecipe, order: RunOptions) -> Result:
    """Train on the Ray cluster at `order.address`, or without one on this machine, where only actors need Ray.

    Raises:
        RecipeError: the recipe, the folder, this machine or the cluster does not allow it.
        TrainingError: the run failed; what was computed is in its folder.
    """
    if needs_ray(recipe, order.address):
        from raytrain.launch.train import run as run_on_ray  # noqa: PLC0415 - slow to import

        return run_on_ray(recipe, order)
    forkserver.start()  # it imports torch while this process does
    from raytrain.launch.elastic import run as run_here  # noqa: PLC0415

    return run_here(recipe, order)


def needs_ray(recipe: TrainRecipe, address: str | None) -> bool:
    """Return whether a recipe trains on Ray: where an address says so, and where actors prepare its data."""
    return address is not None or isinstance(recipe.task.source, ActorSource)
