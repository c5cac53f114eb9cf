"""A run without gradients, made again from its trajectory: each move as it was, to the bit, without data or probes."""

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from raytrain.errors import CheckpointError
from raytrain.models.adapters import is_new
from raytrain.optim.arguments import OPTIONS
from raytrain.optim.optimizers import make_optimizer
from raytrain.optim.options import ZEROTH, OptimizerOptions, with_rules
from raytrain.registry import resolve
from raytrain.seeds.directions import Space
from raytrain.seeds.prng import Mode
from raytrain.seeds.records import Records, Step, read, steps
from raytrain.tensors import digest_of
from raytrain.zeroth.optimizers import ZerothOrder, ZOAdam, ZOMomentum, space_of


class _Shape(BaseModel, frozen=True, extra="forbid"):
    """What directions are, of a recipe's options of them."""

    distribution: Mode
    sparsity: float
    blockwise: bool


class Header(BaseModel, frozen=True, extra="forbid"):
    """What a trajectory says of its beginning.

    Attributes:
        base: a hash of the weights that are moved, and of their directions.
        directions: a hash of the directions alone.
        still: a hash of what is not moved.
        first: name -> first weights of what is new in the model, in base 64.
        optimizer: the recipe's.
        space: of the directions.
    """

    base: str
    directions: str
    still: str
    first: dict[str, str]
    optimizer: dict[str, Any]
    space: _Shape


KNOWN_BY = {
    "base": "weights and directions",
    "directions": "directions",
    "still": "frozen weights and buffers",
}


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
        **_known(space, module),
        "first": first,
        "optimizer": optimizer.model_dump(mode="json"),
        "space": {name: directions[name] for name in ("distribution", "sparsity", "blockwise")},
    }


def retrace(path: Path, module: nn.Module, first: int = 0) -> int:
    """Make the moves of a trajectory on the model that it started from, in place, and return how many steps it has.

    The parameters then equal those of the run to the bit, on any machine that computes as IEEE 754 says. The file holds
    the first weights of a head that is new, all others must be there: those of a pretrained model are the same
    everywhere, and random ones where torch draws and computes alike.

    Args:
        path: the file.
        module: as `raytrain.training.build.build_replica` makes it from the run's recipe.
        first: how many steps the module has behind it, as one of a checkpoint; then only the others are made.

    Raises:
        CheckpointError: the file is no trajectory, lacks a step, or started from other weights; or the module has steps
            behind it, and the stepper keeps more than the weights, or a mask of the first ones. In the first weights of
            a new head the module may be changed even so.
    """
    about, records = read(path)
    try:
        header = Header.model_validate(about, strict=True)
        if not first:
            _write_first(header.first, module)
        optimizer = _stepper(header, module)
        known = _known(optimizer.space, module)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its first line does not say how to make its moves on this model: {error!r}"
        ) from error
    if first and (isinstance(optimizer, ZOMomentum | ZOAdam) or header.space.sparsity):
        raise CheckpointError(
            f"{path}: {header.optimizer['name']} with sparsity = {header.space.sparsity:g} can only be retraced from "
            "its first step, for it goes by more than the weights"
        )
    odd = [name for name in ("directions" if first else "base", "still") if about[name] != known[name]]
    if odd:
        what, theirs, ours = KNOWN_BY[odd[0]], about[odd[0]], known[odd[0]]
        raise CheckpointError(
            f"{path}: this trajectory starts from {what} with digest {theirs[:12]}, and those of the model have "
            f"{ours[:12]}; build the model as the run did, by raytrain.training.build.build_replica from its "
            "recipe.toml"
        )
    count = first
    with torch.no_grad():
        for step in _steps_after(first, path, records):
            count += 1
            if step.slopes:
                optimizer.move(step.slopes, step.rate)
    return count


def _steps_after(first: int, path: Path, records: Records) -> Iterator[Step]:
    """Yield the steps of a trajectory but the first ones, all of which must be there."""
    count = 0
    for count, step in enumerate(steps(records), start=1):
        if step.step != count - 1:
            raise CheckpointError(f"{path}: expected step {count} of the run next; it is not there")
        if count > first:
            yield step
    if count < first:
        raise CheckpointError(f"{path}: expected the {first} steps that the model has behind it; got {count}")


def _known(space: Space, module: nn.Module) -> dict[str, str]:
    """Return hashes by which a model and the directions in it are known, as `KNOWN_BY` says."""
    moved = {part.tensor.data_ptr() for part in space.parts}
    still = (
        (name, value)
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and value.data_ptr() not in moved  # tied weights have several names
    )
    return {"base": space.digest(), "directions": space.meaning(), "still": digest_of(still)}


def _stepper(header: Header, module: nn.Module) -> ZerothOrder:
    """Return what made the moves of a trajectory, for a model."""
    name = header.optimizer["name"]
    options = with_rules(OPTIONS[name]).model_validate(header.optimizer)
    optimizer = make_optimizer(resolve({}, ZEROTH[name], "optimizer.name"), options, module)
    if not isinstance(optimizer, ZerothOrder):  # the table has no others
        raise TypeError(type(optimizer))
    space = header.space
    optimizer.shape(
        space_of(module, optimizer, mode=space.distribution, sparsity=space.sparsity, blocks=space.blockwise)
    )
    return optimizer


def _write_first(values: Mapping[str, str], module: nn.Module) -> None:
    """Write the first weights of what is new in a model, from a trajectory."""
    for name, text in values.items():
        tensor = module.get_parameter(name).data
        if tensor.numel():
            flat = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).view(tensor.dtype)
            tensor.copy_(flat.view(tensor.shape))
