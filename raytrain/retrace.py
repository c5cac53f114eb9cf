"""A run without gradients, made again from its trajectory: each move as it was, to the bit, without data or probes."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raytrain.errors import CheckpointError
from raytrain.model.adapters import is_new
from raytrain.names import resolve
from raytrain.optim.optimizers import ZEROTH, OptimizerOptions, make_optimizer, options_of_optimizer
from raytrain.optim.zeroth import ZerothOrder, ZOAdam, ZOMomentum, space_of
from raytrain.seeds.space import Space
from raytrain.seeds.trajectory import read, steps


def beginning(
    space: Space, module: nn.Module, optimizer: OptimizerOptions, directions: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a trajectory says of its beginning, at the weights that the module has now.

    Args:
        space: of the directions.
        module: the model.
        optimizer: the recipe's.
        directions: the recipe's.
    """
    first = {
        part.name: base64.b64encode(part.tensor.cpu().flatten().view(torch.uint8).numpy().tobytes()).decode()
        for part in space.parts
        if is_new(module.get_parameter(part.name))
    }
    return {
        "base": space.digest(),
        "directions": space.meaning(),
        "first": first,
        "optimizer": optimizer.model_dump(mode="json"),
        "space": {name: directions[name] for name in ("mode", "sparsity", "blocks")},
    }


def retrace(path: Path, module: nn.Module, first: int = 0) -> int:
    """Make the moves of a trajectory on the model that it started from, in place, and return how many steps it has.

    The parameters then equal those of the run to the bit, on any machine that computes as IEEE 754 says. The file holds
    the first weights of a head that is new, all others must be there: those of a pretrained model are the same
    everywhere, and random ones where torch draws and computes alike.

    Args:
        path: the file.
        module: as `raytrain.worker.build` makes it from the run's recipe.
        first: how many steps the module has behind it, as one of a checkpoint; then only the others are made.

    Raises:
        CheckpointError: the file is no trajectory, lacks a step, or started from other weights; or the module has steps
            behind it, and the stepper keeps more than the weights, or a mask of the first ones.
    """
    about, records = read(path)
    try:
        if not first:
            _write_first(about["first"], module)
        optimizer, known_by = _stepper(about, module), str(about["directions" if first else "base"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: its first line does not say how to make its moves on this model: {error!r}"
        ) from error
    if first and (isinstance(optimizer, ZOMomentum | ZOAdam) or about["space"]["sparsity"]):
        raise CheckpointError(
            f"{path}: {about['optimizer']['name']} with sparsity = {about['space']['sparsity']:g} can only be retraced "
            "from its first step, for it goes by more than the weights"
        )
    ours = optimizer.space.meaning() if first else optimizer.space.digest()
    if ours != known_by:
        raise CheckpointError(
            f"{path}: this trajectory starts from weights and directions with digest {known_by[:12]}, and those of the "
            f"model's trainable parameters have {ours[:12]}; make the model as the run did, by raytrain.worker.build "
            "from the recipe.toml of its folder"
        )
    count = 0
    with torch.no_grad():
        for count, step in enumerate(steps(records), start=1):
            if step.step != count - 1:
                raise CheckpointError(f"{path}: expected step {count} of the run next; it is not there")
            if step.slopes and step.step >= first:
                optimizer.move(step.slopes, step.rate)
    return count


def _stepper(about: Mapping[str, Any], module: nn.Module) -> ZerothOrder:
    """Return what made the moves of a trajectory, for a model."""
    constructor = resolve({}, ZEROTH[about["optimizer"]["name"]], "optimizer.name")
    optimizer = make_optimizer(
        constructor, options_of_optimizer(constructor).model_validate(about["optimizer"]), module
    )
    if not isinstance(optimizer, ZerothOrder):  # the table has no others
        raise TypeError(type(optimizer))
    shape = {name: about["space"][name] for name in ("mode", "sparsity", "blocks")}
    optimizer.shape(space_of(module, optimizer, **shape))
    return optimizer


def _write_first(values: Mapping[str, str], module: nn.Module) -> None:
    """Write the first weights of what is new in a model, from a trajectory."""
    for name, text in values.items():
        tensor = module.get_parameter(name).data
        if tensor.numel():
            flat = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).view(tensor.dtype)
            tensor.copy_(flat.view(tensor.shape))
