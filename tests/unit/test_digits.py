import pytest
import torch

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
