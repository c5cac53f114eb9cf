"""Runs a search where its recipe and address say, and imports what that needs."""

from raytrain.kinds import RunOptions
from raytrain.run.result import Result
from search.launch.backend import searches_here, start_slot_server
from search.recipe import SearchRecipe


def dispatch_search(recipe: SearchRecipe, order: RunOptions) -> Result:
    """Search, as `run_search` does, and have slots on this machine import torch while this process does."""
    if searches_here(recipe.base, order.address):
        start_slot_server()
    from search.launch.run import run_search  # noqa: PLC0415 - it imports torch

    return run_search(recipe, order)
