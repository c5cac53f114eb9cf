"""Initialization of a classification head by linear discriminant analysis, or by class means."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raytrain.errors import RecipeError
from raytrain.tensors import to_device

TINY = 1e-12
"""Ratio of within-class to between-class variance below which the former counts as 0."""


def sample_per_class(labels: NDArray[np.int64], shots: int, seed: int) -> list[int]:
    """Return the indices of at most `shots` random examples of each class (0: all)."""
    random = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    return [int(place) for each in classes for place in random.permutation(each)[: shots or None]]


def find_head(module: nn.Module, classes: int) -> nn.Linear:
    """Return the head: the last linear layer with one output per class."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear) and layer.out_features == classes][-1]


def init_discriminant(
    module: nn.Module, batches: Sequence[Any], forward: Callable[[nn.Module, Any], Tensor], *, whole: bool
) -> None:
    """Initialize the head of a classifier by linear discriminant analysis of features.

    With the mean mu_c of each class, their mean m, d_c = mu_c - m and the shared covariance S, the logit of class c is
    d_c^T S^-1 (x - m) - d_c^T S^-1 d_c / 2: the log-posterior of Gaussian classes with equal priors.

    Args:
        module: a classifier whose last linear layer of one output per class is its head.
        batches: with "labels", of every class at least once.
        forward: (module, batch) -> logits, shape (examples, classes).
        whole: whether S is a full matrix, with the shrinkage of Ledoit and Wolf (2004). Otherwise it is a multiple of
            the identity, the variance along the d_c, so that the nearest class mean has the largest logit.

    Raises:
        RecipeError: the head has no bias, or its input is not one vector for each example.

    Source: Fisher 1936; Ledoit and Wolf 2004.
    """
    labels = torch.cat([batch["labels"] for batch in batches])
    classes = int(labels.max()) + 1
    head = find_head(module, classes)
    inputs_of_head: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if head.bias is None or inputs[0].dim() != 2:
            raise RecipeError(
                f"task.head_init: a {type(module).__name__} has no linear layer with a bias on one vector for each "
                f"text, "
                'which class means can be put into; use task.head = "mean", or task.head_init = "random"'
            )
        inputs_of_head.append(inputs[0].double().cpu())

    training = module.training
    module.eval()
    hook = head.register_forward_pre_hook(record)
    try:
        with torch.no_grad():
            for batch in batches:
                forward(module, to_device(batch, head.weight.device, head.weight.dtype))
    finally:
        hook.remove()
        module.train(training)
    features = torch.cat(inputs_of_head)
    means = torch.stack([features[labels == label].mean(dim=0) for label in range(classes)])
    between = means - means.mean(dim=0)
    within = features - means[labels]
    weight = _over_covariance(between, within) if whole else between / _variance(between, within)
    with torch.no_grad():
        head.weight.copy_(weight)
        weight = head.weight.double().cpu()  # rounded to its type
        head.bias.copy_(-(weight @ means.mean(dim=0) + (weight * between).sum(dim=1) / 2))


def _variance(between: Tensor, within: Tensor) -> float:
    """Return the mean variance within classes along the directions between their means."""
    lengths = between.square().sum(dim=1)
    variances = (within @ between.T).square().mean(dim=0) / lengths
    return float(variances.mean()) or float(lengths.mean())


def _over_covariance(between: Tensor, within: Tensor) -> Tensor:
    """Return between @ S^-1 for the shrunk covariance S within classes."""
    from sklearn.covariance import ledoit_wolf  # noqa: PLC0415 - slow to import

    if within.square().mean() <= TINY * between.square().mean():  # one text per class, or equal ones
        return between / _variance(between, within)
    covariance, _ = ledoit_wolf(within.numpy(), assume_centered=True)
    weight: Tensor = torch.linalg.solve(torch.from_numpy(covariance), between.T).T
    return weight
