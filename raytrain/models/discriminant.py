"""A head that starts as what is most likely if the features of each class are normal around their mean."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raytrain.errors import RecipeError
from raytrain.tensors import to_device

TINY = 1e-12
"""Of what is between classes, the share within them that is taken for none."""


def sample_per_class(labels: NDArray[np.int64], shots: int, seed: int) -> list[int]:
    """Return the places of `shots` examples of each class, or of all it has (0: of all): a function of `seed`."""
    random = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    return [int(place) for each in classes for place in random.permutation(each)[: shots or None]]


def find_head(module: nn.Module, classes: int) -> nn.Linear:
    """Return the last linear layer of one output per class."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear) and layer.out_features == classes][-1]


def init_discriminant(
    module: nn.Module, batches: Sequence[Any], forward: Callable[[nn.Module, Any], Tensor], *, whole: bool
) -> None:
    """Set the head of a classifier to the posterior of normal classes, measured on some examples.

    With the mean mu_c of each class, their mean m, d_c = mu_c - m and the covariance S that the classes share, the head
    of x is d_c S^-1 (x - m) - d_c S^-1 d_c / 2: linear discriminant analysis (Fisher 1936), with equal priors.

    Args:
        module: a classifier whose last linear layer of one output per class is its head.
        batches: with "labels" among them, every class at least once.
        forward: (module, batch) -> the logits, shape (examples, classes).
        whole: whether S is a whole matrix, shrunk towards a multiple of the identity as Ledoit and Wolf (2004) do. If
            not, it is such a multiple, so that the nearest centroid is the likeliest class: the variance along the
            directions in which the centroids lie, which is where it decides how sure the head is.

    Raises:
        RecipeError: the head has no bias, or does not see one vector for each example.
    """
    labels = torch.cat([batch["labels"] for batch in batches])
    classes = int(labels.max()) + 1
    head = find_head(module, classes)
    seen: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if head.bias is None or inputs[0].dim() != 2:
            raise RecipeError(
                f"task.start: a {type(module).__name__} has no linear layer with a bias on one vector for each text, "
                'which class means can be put into; use task.head = "mean", or task.start = "random"'
            )
        seen.append(inputs[0].double().cpu())

    training = module.training
    module.eval()
    watch = head.register_forward_pre_hook(look)
    try:
        with torch.no_grad():
            for batch in batches:
                forward(module, to_device(batch, head.weight.device, head.weight.dtype))
    finally:
        watch.remove()
        module.train(training)
    features = torch.cat(seen)
    means = torch.stack([features[labels == label].mean(dim=0) for label in range(classes)])
    apart = means - means.mean(dim=0)
    around = features - means[labels]
    along = _over_covariance(apart, around) if whole else apart / _variance(apart, around)
    with torch.no_grad():
        head.weight.copy_(along)
        along = head.weight.double().cpu()  # as it was rounded
        head.bias.copy_(-(along @ means.mean(dim=0) + (along * apart).sum(dim=1) / 2))


def _variance(apart: Tensor, around: Tensor) -> float:
    lengths = apart.square().sum(dim=1)
    along = (around @ apart.T).square().mean(dim=0) / lengths
    return float(along.mean()) or float(lengths.mean())


def _over_covariance(apart: Tensor, around: Tensor) -> Tensor:
    from sklearn.covariance import ledoit_wolf  # noqa: PLC0415 - slow to import

    if around.square().mean() <= TINY * apart.square().mean():  # a text for each class, or always the same one
        return apart / _variance(apart, around)
    covariance, _ = ledoit_wolf(around.numpy(), assume_centered=True)
    along: Tensor = torch.linalg.solve(torch.from_numpy(covariance), apart.T).T
    return along
