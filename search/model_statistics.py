"""Statistics of the model of a recipe that cost no training."""

from collections.abc import Mapping
from typing import Any

import torch

from raytrain.models.options import PretrainedOptions
from raytrain.training.build import build_task
from raytrain.training.recipe import TrainRecipe


class ParameterCount:
    """Counts the parameters of the model that a recipe trains, without those of an adapter.

    Models are built on the meta device, which allocates nothing, except pretrained ones and those of a task that is
    not one of ours. Recipes whose task is the same are counted once.

    Args:
        base: the recipe that candidates change.
    """

    def __init__(self, base: TrainRecipe) -> None:
        self._base = base
        self._known: dict[str, int] = {}

    def __call__(self, changes: Mapping[str, Any]) -> int:
        """Return the number of parameters after some changes of the base recipe."""
        recipe = self._base.with_overrides(changes)
        key = recipe.task.model_dump_json()
        if key not in self._known:
            real = isinstance(recipe.task, PretrainedOptions) or ":" in recipe.task.name
            with torch.device("cpu" if real else "meta"):
                module = build_task(recipe).model(recipe.seed)
            self._known[key] = sum(parameter.numel() for parameter in module.parameters())
        return self._known[key]
