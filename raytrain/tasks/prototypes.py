"""A head that starts as the nearest-centroid classifier of a few examples."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raytrain.errors import RecipeError

BATCH = 32


def chosen(labels: NDArray[np.int64], shots: int, seed: int) -> list[list[int]]:
    """Return the places of `shots` examples of each class, or of all it has, in batches: a function of `seed`."""
    random = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    places = [int(place) for each in classes for place in random.permutation(each)[:shots]]
    return [places[at : at + BATCH] for at in range(0, len(places), BATCH)]


def head_of(module: nn.Module, classes: int) -> nn.Linear:
    """Return the last linear layer of one output per class."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear) and layer.out_features == classes][-1]


def start(module: nn.Module, batches: Sequence[Any], forward: Callable[[nn.Module, Any], Tensor]) -> None:
    """Set the head of a classifier to the posterior of Gaussian classes around the mean features of some examples.

    The classes share one variance in all directions, so this ranks by the nearest centroid. It is measured along the
    directions in which the centroids lie, which is where it decides how sure the head is. The head of x is, with the
    mean mu_c of each class, their mean m, d_c = mu_c - m and the variance v: d_c (x - m) / v - d_c^2 / (2 v).

    Args:
        module: a classifier whose last linear layer of one output per class is its head.
        batches: with "labels" among them, every class at least once.
        forward: (module, batch) -> the logits, shape (examples, classes).

    Raises:
        RecipeError: the head has no bias, or does not see one vector for each example.
    """
    labels = torch.cat([batch["labels"] for batch in batches])
    classes = int(labels.max()) + 1
    head = head_of(module, classes)
    seen: list[Tensor] = []
    watch = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    training = module.training
    module.eval()
    with torch.no_grad():
        for batch in batches:
            forward(module, batch)
    module.train(training)
    watch.remove()
    if head.bias is None or seen[0].dim() != 2:
        raise RecipeError(
            f"task.start: a {type(module).__name__} has no linear layer with a bias on one vector for each text, which "
            'prototypes can be put into; use task.head = "mean", or task.start = "random"'
        )
    features = torch.cat(seen)
    means = torch.stack([features[labels == label].mean(dim=0) for label in range(classes)])
    apart = means - means.mean(dim=0)
    lengths = apart.square().sum(dim=1)
    along = ((features - means[labels]) @ apart.T).square().mean(dim=0) / lengths
    variance = float(along.mean()) or float(lengths.mean())
    with torch.no_grad():
        head.weight.copy_(apart / variance)
        head.bias.copy_(-(apart @ means.mean(dim=0) + lengths / 2) / variance)
