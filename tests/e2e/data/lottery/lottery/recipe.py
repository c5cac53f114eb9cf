"""Recipes of the kind `lottery`."""

from typing import Literal

from pydantic import Field

from raytrain.recipe import Recipe

PRIZES = {"lowest": "lottery.results:lowest", "highest": "lottery.results:highest"}


class LotteryRecipe(Recipe):
    """How often to draw, and which loss wins."""

    kind: Literal["lottery"] = "lottery"
    draws: int = Field(20, ge=1)
    prize: Literal["lowest", "highest"] = "lowest"


def odds(recipe: LotteryRecipe) -> list[str]:
    """Return how likely it is that a draw wins."""
    return [f"a draw wins with probability 1/{recipe.draws}"]
