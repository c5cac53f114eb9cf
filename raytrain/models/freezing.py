"""Freezing: parameters by pattern, and half fine-tuning (HFT)."""

from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from raytrain.errors import RecipeError
from raytrain.models.blocks import repeated_blocks
from raytrain.registry import suggest


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze parameters whose names match a pattern, such as "*embeddings*".

    Raises:
        RecipeError: a pattern matches no parameter, or none is left to train.
    """
    named = dict(module.named_parameters())
    for pattern in patterns:
        matching = [parameter for name, parameter in named.items() if fnmatchcase(name, pattern)]
        if not matching:
            raise RecipeError(f"freeze.match: {pattern!r} matches no parameter of the model; {suggest(pattern, named)}")
        for parameter in matching:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise RecipeError("freeze.match: no parameter of the model is left to train; freeze fewer")


class HalfFineTuning:
    """Half fine-tuning: freezes half of the layers of each type in each block (Hui et al. 2024, HFT).

    Frozen layers need no gradients and no optimizer state. Layers outside of blocks, such as embeddings and heads, are
    always trained. Of an odd number of layers, the smaller or the larger half is frozen with equal probability.

    Args:
        module: the model; parameters that are frozen already stay so.
        seed: of the random selection, equal on all replicas.
        every: steps between selections; 0: one selection for the whole run.

    Raises:
        RecipeError: the model has no repeated blocks.
    """

    def __init__(self, module: nn.Module, seed: int, every: int) -> None:
        self._seed = seed
        self._every = every
        self._round = -1
        self._kinds = [kind for block in repeated_blocks(module) for kind in _layers_by_type(block)]
        if not self._kinds:
            raise RecipeError("freeze.random_half: the model has no repeated blocks to freeze a half of")

    def select(self, step: int, optimizer: Optimizer) -> None:
        """Freeze the half of `step` and unfreeze the other; drop the optimizer state of the frozen half."""
        turn = step // self._every if self._every else 0
        if turn == self._round:
            return
        self._round = turn
        random = np.random.default_rng([self._seed, turn])
        for layers in self._kinds:
            frozen = (len(layers) + int(random.integers(2))) // 2
            order = random.permutation(len(layers)).tolist()
            for parameter in (parameter for layer in order[frozen:] for parameter in layers[layer]):
                parameter.requires_grad_(True)
            for parameter in (parameter for layer in order[:frozen] for parameter in layers[layer]):
                parameter.requires_grad_(False)
                optimizer.state.pop(parameter, None)


def _layers_by_type(block: nn.Module) -> list[list[list[Tensor]]]:
    """Return the trainable parameters of each layer, grouped by type of layer."""
    kinds: dict[type[nn.Module], list[list[Tensor]]] = defaultdict(list)
    for layer in block.modules():
        own: list[Tensor] = [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]
        if own:
            kinds[type(layer)].append(own)
    return list(kinds.values())
