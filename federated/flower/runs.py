"""A run on a Flower `Grid`, whichever its protocol."""

from federated.flower.seed_run import SeedRun
from federated.flower.strategy_run import StrategyRun
from federated.recipe import FederateRecipe

FederatedRun = SeedRun | StrategyRun


def run_of(recipe: FederateRecipe) -> FederatedRun:
    """Return the run of a recipe, before its first round.

    Raises:
        RecipeError: the recipe does not fit the data, the model or the strategy.
    """
    return SeedRun(recipe) if recipe.seeded else StrategyRun(recipe)
