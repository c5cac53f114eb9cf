"""Chooses the backend of a recipe, this machine or a Ray cluster, and imports it."""

from raytrain.by_value import check_importable
from raytrain.data.source import ActorSource
from raytrain.kinds import RunOptions
from raytrain.launch import forkserver
from raytrain.run.result import Result
from raytrain.training.recipe import TrainRecipe


def run_training(recipe: TrainRecipe, order: RunOptions) -> Result:
    """Train on the Ray cluster at `order.address`, or without one on this machine, where only actors need Ray.

    Raises:
        RecipeError: the recipe, the folder, this machine or the cluster does not allow it.
        TrainingError: the run failed; what was computed is in its folder.
    """
    if isinstance(recipe.task.source, ActorSource):
        check_importable(recipe, "an actor that prepares data")
    if needs_ray(recipe, order.address):
        from raytrain.launch.train import run_on_ray  # noqa: PLC0415 - slow to import

        return run_on_ray(recipe, order)
    forkserver.start_forkserver("raytrain.launch.elastic")  # which imports torch while this process does
    from raytrain.launch.elastic import run_elastic  # noqa: PLC0415

    return run_elastic(recipe, order)


def needs_ray(recipe: TrainRecipe, address: str | None) -> bool:
    """Return whether a recipe needs Ray: with an address, or with a source in actors."""
    return address is not None or isinstance(recipe.task.source, ActorSource)
