"""Classification of handwritten digits: the 1,797 images of 8 x 8 pixels of scikit-learn."""

import math
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raytrain.errors import RecipeError
from raytrain.tasks.options import DigitsOptions
from raytrain.tasks.task import Task
from raytrain.tensors import at_least_float32

SIDE = 8
CLASSES = 10


class DigitExamples:
    """A split of the images.

    Args:
        images: shape (n, 1, 8, 8), from 0 to 1.
        labels: shape (n,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return (image, label)."""
        return self._images[index], self._labels[index]

    def label(self, index: int) -> int:
        """Return the digit."""
        return int(self._labels[index])

    def domain(self, index: int) -> str:  # noqa: ARG002 - the writers of these digits were not recorded
        """Return the only domain."""
        return "digits"


def digits(options: DigitsOptions) -> Task:
    """Classification of handwritten digits (8 x 8 pixels, from scikit-learn)."""

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return _mlp(options) if options.model == "mlp" else _cnn(options)

    def data(split: Literal["train", "valid"]) -> DigitExamples:
        return _splits(options.valid)[split]

    def references() -> dict[str, float]:
        counts = np.bincount([data("valid").label(index) for index in range(len(data("valid")))])
        return {"accuracy_of_commonest_digit": counts.max() / counts.sum()}

    return Task(
        model=model,
        data=data,
        losses=_losses,
        measure=_measure,
        metric="accuracy",
        better="higher",
        references=references,
    )


def _losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return cross_entropy(at_least_float32(model(images)), labels, reduction="none")


def _measure(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[float, float]]:
    images, labels = batch
    scores = model(images).double()
    right = (scores.argmax(dim=1) == labels).sum()
    return {
        "loss": (float(cross_entropy(scores, labels, reduction="sum")), len(labels)),
        "accuracy": (float(right), len(labels)),
    }


@cache
def _splits(valid: float) -> dict[str, DigitExamples]:
    pixels, labels = _read()
    images = torch.from_numpy(pixels).float().div(16).view(-1, 1, SIDE, SIDE)
    train, held_out = (torch.from_numpy(places) for places in _stratified(labels, valid))
    digit = torch.from_numpy(labels)
    return {
        "train": DigitExamples(images[train], digit[train]),
        "valid": DigitExamples(images[held_out], digit[held_out]),
    }


def _read() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return (pixels from 0 to 16, shape (n, 64); labels, shape (n,)), as `load_digits` does.

    The file is read directly, because importing scikit-learn takes longer than a short training.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise RecipeError("task.name: digits needs scikit-learn, which holds the images: pip install scikit-learn")
    rows = np.loadtxt(Path(package.origin).with_name("datasets") / "data" / "digits.csv.gz", delimiter=",")
    return rows[:, :-1], rows[:, -1].astype(np.int64)


def _stratified(labels: NDArray[np.int64], valid: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices (training, held out) of scikit-learn's `train_test_split`, stratified.

    Args:
        labels: of all examples, from 0 to 9.
        valid: fraction that is held out.

    Raises:
        RecipeError: a split is too small to contain each label.
    """
    counts, held_out = np.bincount(labels), math.ceil(valid * len(labels))
    if min(held_out, len(labels) - held_out) < len(counts):
        raise RecipeError(
            f"task.valid: expected a share that leaves at least {len(counts)} of the {len(labels)} images on either "
            f"side, one of each digit; {valid:g} holds out {held_out}"
        )
    draw = np.random.RandomState(0)
    firsts = _shares(counts, len(labels) - held_out, draw)
    seconds = _shares(counts - firsts, held_out, draw)
    train, rest = [], []
    for label, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        places = draw.permutation(np.flatnonzero(labels == label))
        train.append(places[:first])
        rest.append(places[first : first + second])
    return draw.permutation(np.concatenate(train)), draw.permutation(np.concatenate(rest))


def _shares(counts: NDArray[np.int64], total: int, draw: np.random.RandomState) -> NDArray[np.int64]:
    """Divide `total` in proportion to `counts`, rounding up the largest remainders."""
    exact = counts / counts.sum() * total
    shares = np.floor(exact)
    remainders, missing = exact - shares, int(total - shares.sum())
    for remainder in np.unique(remainders)[::-1]:
        if not missing:
            break
        (equal,) = np.nonzero(remainders == remainder)
        drawn = draw.choice(equal, size=min(len(equal), missing), replace=False)
        shares[drawn] += 1
        missing -= len(drawn)
    return np.asarray(shares, np.int64)


def _mlp(options: DigitsOptions) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    inner = SIDE * SIDE
    for width in _repeated(options):
        norm = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}[options.norm](width)
        layers += [nn.Linear(inner, width), norm, nn.ReLU(), nn.Dropout(options.dropout)]
        inner = width
    return nn.Sequential(*layers, nn.Linear(inner, CLASSES))


def _cnn(options: DigitsOptions) -> nn.Module:
    layers: list[nn.Module] = []
    inner = 1
    for width in _repeated(options):
        # A layer norm of an image is a group norm with one group.
        norm = {"batch": nn.BatchNorm2d(width), "layer": nn.GroupNorm(1, width), "none": nn.Identity()}[options.norm]
        layers += [nn.Conv2d(inner, width, 3, padding=1), norm, nn.ReLU(), nn.Dropout2d(options.dropout)]
        inner = width
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(inner * (SIDE // 2) ** 2, CLASSES))


def _repeated(options: DigitsOptions) -> list[int]:
    return [width for width in options.widths for _ in range(options.depth)]
