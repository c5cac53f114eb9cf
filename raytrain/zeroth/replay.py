"""A run without gradients, made again from its trajectory: each move as it was, to the bit, without data or probes."""

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from raytrain.errors import CheckpointError
from raytrain.models.adapters import is_untrained
from raytrain.optim.arguments import OPTIMIZER_OPTIONS
from raytrain.optim.optimizers import make_optimizer
from raytrain.optim.options import ZEROTH_ORDER, OptimizerOptions, with_rules
from raytrain.registry import resolve
from raytrain.seeds.directions import Directions
from raytrain.seeds.prng import Distribution
from raytrain.seeds.records import RecordArray, TrajectoryStep, read_trajectory, trajectory_steps
from raytrain.tensors import tensor_digest
from raytrain.zeroth.optimizers import ZerothOrderOptimizer, ZOAdam, ZOMomentum, directions_of


class _Shape(BaseModel, frozen=True, extra="forbid"):
    """What directions are, of a recipe's options of them."""

    distribution: Distribution
    sparsity: float
    blockwise: bool


class TrajectoryHeader(BaseModel, frozen=True, extra="forbid"):
    """What a trajectory says of its beginning.

    Attributes:
        base: a hash of the weights that are moved, and of their directions.
        directions: a hash of the directions alone.
        frozen: a hash of what is not moved.
        initial: name -> first weights of what is new in the model, in base 64.
        optimizer: the recipe's.
        zo: of the directions.
    """

    base: str
    directions: str
    frozen: str
    initial: dict[str, str]
    optimizer: dict[str, Any]
    zo: _Shape


DIGESTS = {
    "base": "weights and directions",
    "directions": "directions",
    "still": "frozen weights and buffers",
}


def trajectory_header(
    directions: Directions, module: nn.Module, optimizer: OptimizerOptions, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a trajectory says of its beginning, at the weights that the module has now.

    Args:
        directions: of the directions.
        module: the model.
        optimizer: the recipe's.
        options: the recipe's.
    """
    first = {
        part.name: base64.b64encode(part.tensor.cpu().flatten().view(torch.uint8).numpy().tobytes()).decode()
        for part in directions.slices
        if is_untrained(module.get_parameter(part.name))
    }
    return {
        **_known(directions, module),
        "first": first,
        "optimizer": optimizer.model_dump(mode="json"),
        "space": {name: options[name] for name in ("distribution", "sparsity", "blockwise")},
    }


def replay_trajectory(path: Path, module: nn.Module, completed_steps: int = 0) -> int:
    """Make the moves of a trajectory on the model that it started from, in place, and return how many steps it has.

    The parameters then equal those of the run to the bit, on any machine that computes as IEEE 754 says. The file holds
    the first weights of a head that is new, all others must be there: those of a pretrained model are the same
    everywhere, and random ones where torch draws and computes alike.

    Args:
        path: the file.
        module: as `raytrain.training.worker.build` makes it from the run's recipe.
        completed_steps: how many steps the module has behind it, as one of a checkpoint; then only the others are made.

    Raises:
        CheckpointError: the file is no trajectory, lacks a step, or started from other weights; or the module has steps
            behind it, and the stepper keeps more than the weights, or a mask of the first ones. In the first weights of
            a new head the module may be changed even so.
    """
    about, records = read_trajectory(path)
    try:
        header = TrajectoryHeader.model_validate(about, strict=True)
        if not completed_steps:
            _write_first(header.initial, module)
        optimizer = _stepper(header, module)
        known = _known(optimizer.directions, module)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its first line does not say how to make its moves on this model: {error!r}"
        ) from error
    if completed_steps and (isinstance(optimizer, ZOMomentum | ZOAdam) or header.zo.sparsity):
        raise CheckpointError(
            f"{path}: {header.optimizer['name']} with sparsity = {header.zo.sparsity:g} can only be retraced from "
            "its first step, for it goes by more than the weights"
        )
    odd = [name for name in ("directions" if completed_steps else "base", "still") if about[name] != known[name]]
    if odd:
        what, theirs, ours = DIGESTS[odd[0]], about[odd[0]], known[odd[0]]
        raise CheckpointError(
            f"{path}: this trajectory starts from {what} with digest {theirs[:12]}, and those of the model have "
            f"{ours[:12]}; make the model as the run did, by raytrain.training.worker.build from the recipe.toml of "
            "its folder"
        )
    count = completed_steps
    with torch.no_grad():
        for step in _steps_after(completed_steps, path, records):
            count += 1
            if step.projected_gradients:
                optimizer.apply(step.projected_gradients, step.lr)
    return count


def _steps_after(first: int, path: Path, records: RecordArray) -> Iterator[TrajectoryStep]:
    """Yield the steps of a trajectory but the first ones, all of which must be there."""
    count = 0
    for count, step in enumerate(trajectory_steps(records), start=1):
        if step.step != count - 1:
            raise CheckpointError(f"{path}: expected step {count} of the run next; it is not there")
        if count > first:
            yield step
    if count < first:
        raise CheckpointError(f"{path}: expected the {first} steps that the model has behind it; got {count}")


def _known(space: Directions, module: nn.Module) -> dict[str, str]:
    """Return hashes by which a model and the directions in it are known, as `DIGESTS` says."""
    moved = {part.tensor.data_ptr() for part in space.slices}
    still = (
        (name, value)
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and value.data_ptr() not in moved  # tied weights have several names
    )
    return {"base": space.digest(), "directions": space.direction_digest(), "still": tensor_digest(still)}


def _stepper(header: TrajectoryHeader, module: nn.Module) -> ZerothOrderOptimizer:
    """Return what made the moves of a trajectory, for a model."""
    name = header.optimizer["name"]
    options = with_rules(OPTIMIZER_OPTIONS[name]).model_validate(header.optimizer)
    optimizer = make_optimizer(resolve({}, ZEROTH_ORDER[name], "optimizer.name"), options, module)
    if not isinstance(optimizer, ZerothOrderOptimizer):  # the table has no others
        raise TypeError(type(optimizer))
    space = header.zo
    optimizer.bind(
        directions_of(
            module, optimizer, distribution=space.distribution, sparsity=space.sparsity, blockwise=space.blockwise
        )
    )
    return optimizer


def _write_first(values: Mapping[str, str], module: nn.Module) -> None:
    """Write the first weights of what is new in a model, from a trajectory."""
    for name, text in values.items():
        tensor = module.get_parameter(name).data
        if tensor.numel():
            flat = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).view(tensor.dtype)
            tensor.copy_(flat.view(tensor.shape))
