import re

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from raytrain.errors import RecipeError
from raytrain.tasks.digits import DigitsOptions, digits


def test_images_are_split_once_and_keep_their_shares() -> None:
    task = digits(DigitsOptions(name="digits"))
    train, valid = task.data("train"), task.data("valid")
    assert (len(train), len(valid)) == (1437, 360)
    seen = {train[place][0].numpy().tobytes() for place in range(len(train))}
    assert sum(valid[place][0].numpy().tobytes() in seen for place in range(len(valid))) == 0
    counts = torch.bincount(torch.tensor([valid.label(place) for place in range(len(valid))]))
    assert counts.min() >= 34
    assert train[0][0].shape == (1, 8, 8)
    assert train[0][0].max() <= 1


@pytest.mark.parametrize("valid", [0.01, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.9, 0.99])
def test_images_are_those_that_scikit_learn_reads_and_splits(valid: float) -> None:
    task = digits(DigitsOptions(name="digits", valid=valid))
    images, labels = load_digits(return_X_y=True)
    expected = train_test_split(images, labels, test_size=valid, stratify=labels, random_state=0)
    for split, pixels, digit in (("train", expected[0], expected[2]), ("valid", expected[1], expected[3])):
        examples = task.data(split)
        assert [examples.label(place) for place in range(len(examples))] == digit.tolist()
        found = np.stack([examples[place][0].numpy() for place in range(len(examples))])
        assert np.array_equal(found.reshape(-1, 64), (pixels / 16).astype(np.float32))


@pytest.mark.parametrize(("valid", "held_out"), [(0.001, 2), (0.9999, 1797)])
def test_a_part_that_cannot_hold_each_digit_is_refused(valid: float, held_out: int) -> None:
    message = (
        "task.valid: expected a share that leaves at least 10 of the 1797 images on either side, one of each digit; "
        f"{valid} holds out {held_out}"
    )
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        digits(DigitsOptions(name="digits", valid=valid)).data("valid")


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("depth", [1, 2])
def test_models_are_what_their_options_say(model: str, norm: str, depth: int) -> None:
    options = DigitsOptions(name="digits", model=model, norm=norm, depth=depth, widths=(8, 12), dropout=0.1)
    module = digits(options).model(0)
    layers = [type(layer).__name__ for layer in module]
    assert module(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    assert sum(name in ("Linear", "Conv2d") for name in layers) == 2 * depth + 1
    names = {"none": "Identity", "batch": "BatchNorm", "layer": "Norm"}
    assert sum(names[norm] in name for name in layers) == 2 * depth
    assert sum("Dropout" in name for name in layers) == 2 * depth
