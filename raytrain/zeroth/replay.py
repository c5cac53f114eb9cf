"""Reconstruction of a zeroth-order run from its trajectory, to the bit, without data."""

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


class _Perturbations(BaseModel, frozen=True, extra="forbid"):
    """The recipe's options that determine what a seed stands for."""

    distribution: Distribution
    sparsity: float
    blockwise: bool


class TrajectoryHeader(BaseModel, frozen=True, extra="forbid"):
    """The first line of a trajectory.

    Attributes:
        base: digest of the initial weights of updated parameters, and of their directions.
        directions: digest of the directions alone.
        frozen: digest of frozen parameters and buffers.
        initial: name -> initial weights, in base 64, of parameters that no pretrained model has, such as a new head.
        optimizer: the recipe's options.
        zo: the options that determine the directions.
    """

    base: str
    directions: str
    frozen: str
    initial: dict[str, str]
    optimizer: dict[str, Any]
    zo: _Perturbations


DIGESTS = {
    "base": "weights and directions",
    "directions": "directions",
    "frozen": "frozen weights and buffers",
}


def trajectory_header(
    directions: Directions, module: nn.Module, optimizer: OptimizerOptions, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the header of a trajectory that starts from the module's current weights.

    Args:
        directions: over the module's parameters.
        module: the model.
        optimizer: the recipe's options of the optimizer.
        options: the recipe's options of perturbations.
    """
    initial = {
        part.name: base64.b64encode(part.tensor.cpu().flatten().view(torch.uint8).numpy().tobytes()).decode()
        for part in directions.slices
        if is_untrained(module.get_parameter(part.name))
    }
    return {
        **_digests(directions, module),
        "initial": initial,
        "optimizer": optimizer.model_dump(mode="json"),
        "zo": {
            "distribution": options["distribution"],
            "sparsity": options["sparsity"],
            "blockwise": options["blockwise"],
        },
    }


def replay_trajectory(path: Path, module: nn.Module, completed_steps: int = 0) -> int:
    """Apply a trajectory's updates to the model that it starts from, in place; return its steps.

    The parameters then equal those of the run to the bit, on any machine with IEEE 754 arithmetic. The file contains
    the initial weights of a new head. All others must be the module's: pretrained weights are the same everywhere, and
    random ones wherever torch generates the same bits.

    Args:
        path: the file.
        module: built from the run's recipe by `raytrain.training.build.build_replica`.
        completed_steps: steps that the module already contains, as one from a checkpoint; these are skipped.

    Raises:
        CheckpointError: the file is not a trajectory, lacks a step, or starts from other weights; or there are
            completed steps, and the optimizer has a state, or the directions a mask, that only a replay from the first
            step restores. The weights of a new head may be changed even then.
    """
    about, records = read_trajectory(path)
    try:
        header = TrajectoryHeader.model_validate(about, strict=True)
        if not completed_steps:
            _write_initial(header.initial, module)
        optimizer = _make_optimizer(header, module)
        digests = _digests(optimizer.directions, module)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header does not fit this model: {error!r}") from error
    if completed_steps and (isinstance(optimizer, ZOMomentum | ZOAdam) or header.zo.sparsity):
        raise CheckpointError(
            f"{path}: {header.optimizer['name']} with sparsity = {header.zo.sparsity:g} can only be replayed from "
            "its first step, because its updates depend on more than the weights"
        )
    odd = [name for name in ("directions" if completed_steps else "base", "frozen") if about[name] != digests[name]]
    if odd:
        what, theirs, ours = DIGESTS[odd[0]], about[odd[0]], digests[odd[0]]
        raise CheckpointError(
            f"{path}: expected {what} with digest {theirs[:12]}, from which this trajectory starts; got {ours[:12]}; "
            "build the model by raytrain.training.build.build_replica from the recipe.toml in the run's folder"
        )
    count = completed_steps
    with torch.no_grad():
        for step in _steps_after(completed_steps, path, records):
            count += 1
            if step.projected_gradients:
                optimizer.apply(step.projected_gradients, step.lr)
    return count


def _steps_after(completed_steps: int, path: Path, records: RecordArray) -> Iterator[TrajectoryStep]:
    """Yield the steps after the first ones, and check that none is missing."""
    count = 0
    for count, step in enumerate(trajectory_steps(records), start=1):
        if step.step != count - 1:
            raise CheckpointError(f"{path}: expected step {count} of the run next; it is missing")
        if count > completed_steps:
            yield step
    if count < completed_steps:
        raise CheckpointError(f"{path}: expected the {completed_steps} steps that the model contains; got {count}")


def _digests(directions: Directions, module: nn.Module) -> dict[str, str]:
    """Return the digests of a model and of the directions over it, by the keys of `DIGESTS`."""
    updated = {part.tensor.data_ptr() for part in directions.slices}
    frozen = (
        (name, value)
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and value.data_ptr() not in updated  # tied weights have several names
    )
    return {"base": directions.digest(), "directions": directions.direction_digest(), "frozen": tensor_digest(frozen)}


def _make_optimizer(header: TrajectoryHeader, module: nn.Module) -> ZerothOrderOptimizer:
    """Return the optimizer of a trajectory, for a model."""
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


def _write_initial(values: Mapping[str, str], module: nn.Module) -> None:
    """Write the initial weights of new parameters of a model, from a trajectory."""
    for name, text in values.items():
        tensor = module.get_parameter(name).data
        if tensor.numel():
            flat = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).view(tensor.dtype)
            tensor.copy_(flat.view(tensor.shape))
