"""Handwritten digits: the 1,797 images of 8 x 8 pixels that come with scikit-learn."""

from functools import cache
from typing import Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raytrain.errors import RecipeError
from raytrain.task import Task, TaskOptions
from raytrain.tensors import wide

SIDE = 8
CLASSES = 10


class DigitsOptions(TaskOptions):
    """Options of `digits`.

    Attributes:
        model: "mlp" or "cnn".
        widths: units of each hidden layer, or channels of each convolution.
        depth: how often each width is repeated.
        dropout: probability of dropping a hidden unit, or a channel.
        norm: what follows each layer.
        valid: share of the images that is held out, the same images for every seed.
    """

    model: Literal["mlp", "cnn"] = "cnn"
    widths: tuple[PositiveInt, ...] = Field((32, 64), min_length=1)
    depth: int = Field(1, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    norm: Literal["none", "batch", "layer"] = "none"
    valid: float = Field(0.2, gt=0, lt=1)


class DigitExamples:
    """Some of the images.

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
        """Return the one source there is."""
        return "digits"


def digits(options: DigitsOptions) -> Task:
    """Return the task of telling handwritten digits apart."""

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
    return cross_entropy(wide(model(images)), labels, reduction="none")


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
    from sklearn.datasets import load_digits  # noqa: PLC0415 - slow to import, and only wanted with this data
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    images, labels = load_digits(return_X_y=True)
    try:
        parts = train_test_split(images, labels, test_size=valid, stratify=labels, random_state=0)
    except ValueError as error:
        raise RecipeError(f"task.valid: {valid:g} leaves too few of the {len(labels)} images: {error}") from None
    train, held_out, train_labels, held_out_labels = (torch.from_numpy(part) for part in parts)

    def examples(flat: Tensor, digit: Tensor) -> DigitExamples:
        return DigitExamples(flat.float().div(16).view(-1, 1, SIDE, SIDE), digit.long())

    return {"train": examples(train, train_labels), "valid": examples(held_out, held_out_labels)}


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
