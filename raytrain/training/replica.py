"""A replica: one copy of what is trained, and its whole state."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ConfigDict, with_config
from torch import Tensor, nn
from torch.optim import Optimizer

from raytrain.errors import CheckpointError
from raytrain.json_files import parse_json
from raytrain.models.freezing import HalfFineTuning
from raytrain.optim.ema import Average
from raytrain.optim.optimizers import load_state_by_name, state_by_name
from raytrain.optim.options import OptimizerOptions
from raytrain.serialization import canonical_json, state_to_device
from raytrain.sync.shards import Shards
from raytrain.sync.synchroniser import Synchroniser
from raytrain.zeroth.step import ZeroOrderStep

Status = Literal["running", "done", "stopped early", "interrupted"]


@with_config(ConfigDict(extra="forbid"))
@dataclass(slots=True)
class Progress:
    """Where a run stands: equal on every replica, and part of every checkpoint.

    Attributes:
        step: optimizer steps done.
        position: examples drawn by all replicas together, which is the sampler's position.
        best: the best value of the task's metric so far.
        best_step: the step it was measured at.
        stale: evaluations since then.
        evaluated: the step of the last evaluation.
        seconds: time spent training, over all attempts.
        stalled_seconds: how much of it the first replica waited for data.
        bytes_sent: bytes that the first replica put on the wire, over all attempts.
        exchange_seconds: how long its exchanges were under way, one after the other.
        waited_seconds: how much of that it stood still for.
        status: "running", or why it ended: "done", "stopped early", "interrupted".
    """

    step: int = 0
    position: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    evaluated: int = 0
    seconds: float = 0.0
    stalled_seconds: float = 0.0
    bytes_sent: int = 0
    exchange_seconds: float = 0.0
    waited_seconds: float = 0.0
    status: Status = "running"


def plain(progress: Progress) -> dict[str, Any]:
    """Return the progress as plain data."""
    return {field: getattr(progress, field) for field in Progress.__slots__}


def progress_from(saved: Mapping[str, Any], path: object) -> Progress:
    """Return the progress that `plain` was given.

    Args:
        saved: what it returned.
        path: where it came from, for the error message.

    Raises:
        CheckpointError: it is something else.
    """
    return parse_json(canonical_json(dict(saved)), Progress, str(path), CheckpointError)


@dataclass(slots=True)
class Replica:
    """One copy of what is trained, and its place among the others.

    Attributes:
        module: the model, to compute with.
        elsewhere: names of parameters that an adapter stands beside: they never move, and are not saved.
        base: a hash of these, by which they are known again.
        half: freezes a half of each block at a time, if that is wanted.
        optimizer: over its trainable parameters.
        options: what the optimizer was made with.
        ema: the average of the weights that is evaluated in their place, if there is one.
        sync: keeps the replicas together.
        progress: where the run stands.
        device, dtype: of the parameters.
        rank: this replica's place among `members`.
        shards: this replica's parts of the parameters, if it does not keep all of them.
        zeroth: how it probes and moves, if its optimizer takes no gradients.
    """

    module: nn.Module
    elsewhere: frozenset[str]
    base: str
    half: HalfFineTuning | None
    optimizer: Optimizer
    options: OptimizerOptions
    ema: Average | None
    sync: Synchroniser
    progress: Progress
    device: torch.device
    dtype: torch.dtype
    rank: int
    members: int
    shards: Shards | None = None
    zeroth: ZeroOrderStep | None = None

    @property
    def parts(self) -> nn.Module:
        """What this replica keeps of the model's parameters, to step and to average: all of it, unless sharded."""
        return self.shards.parts if self.shards else self.module


def state_of(replica: Replica) -> dict[str, Any]:
    """Return what this replica puts into a checkpoint: its own part, and from the first replica what all share.

    There is no random state in it: what a step draws follows from the seed, the rank and the step.
    """
    optimizer = state_by_name(replica.optimizer, replica.parts)
    own: dict[str, Any] = {"sync": replica.sync.state_dict()}
    if replica.sync.apart:
        own["optimizer"] = {"name": replica.options.name, **optimizer}
    if replica.rank > 0 and not replica.shards:  # with shards, all of them take part in putting these together
        return own
    whole = replica.shards.whole if replica.shards else _as_it_is
    average = replica.ema.state_dict() if replica.ema else {}
    with replica.sync.shared():
        model = {name: whole(name, tensor) for name, tensor in _tensors(replica, replica.parts)}
        if replica.sync.apart:
            model = {name: tensor.clone() for name, tensor in model.items()}
    shared = {
        "model": model,
        "base": replica.base,
        "optimizer": {"name": replica.options.name, **optimizer, "state": _entries(optimizer["state"], whole)},
        "ema": {name: whole(name, tensor) for name, tensor in average.items()},
    }
    return {**own, **shared} if replica.rank == 0 else own


def load_model(replica: Replica, shared: Mapping[str, Any], path: object, *, averaged: bool = False) -> None:
    """Copy saved parameters and buffers into the model, or of each parameter this replica's part.

    Args:
        replica: newly made.
        shared: what the first replica saved.
        path: where it came from, for the error message.
        averaged: take the average of the weights, if there is one.

    Raises:
        CheckpointError: they are those of another model; the message names the first difference.
    """
    saved = {**shared["model"], **(shared["ema"] if averaged else {})}
    ours = dict(_tensors(replica, replica.module))
    for name in sorted(ours.keys() | saved.keys()):
        there, here = saved.get(name), ours.get(name)
        if there is None or here is None or there.shape != here.shape:
            raise CheckpointError(
                f"{path}: this checkpoint is of another model: {name} is {_shape(there)} in the checkpoint and "
                f"{_shape(here)} in the model; use the task options that the run was started with, or another --out"
            )
    if shared["base"] != replica.base:
        raise CheckpointError(
            f"{path}: this checkpoint is of an adapter beside another model: the weights at task.model are not those "
            "that it was trained with"
        )
    cut = replica.shards.cut if replica.shards else _as_it_is
    with torch.no_grad():
        for name, tensor in _tensors(replica, replica.parts):
            tensor.copy_(cut(name, saved[name]))


def load_state(replica: Replica, shared: Mapping[str, Any], own: Mapping[str, Any] | None, path: object) -> None:
    """Put a checkpoint's state into a replica.

    Args:
        replica: newly made.
        shared: what the first replica saved.
        own: what the replica of this rank saved, or None if there were more or fewer replicas then.
        path: where it came from, for the error message.

    Raises:
        CheckpointError: it is the state of another model or optimizer.
    """
    load_model(replica, shared, path)
    if shared["optimizer"]["name"] != replica.options.name:
        raise CheckpointError(
            f"{path}: this checkpoint's optimizer is {shared['optimizer']['name']}, and the recipe's is "
            f"{replica.options.name}; set optimizer.name={shared['optimizer']['name']} to continue"
        )
    cut = replica.shards.cut if replica.shards else _as_it_is
    apart = replica.sync.apart and own is not None and "optimizer" in own
    saved = own["optimizer"] if own is not None and apart else shared["optimizer"]
    optimizer = {**saved, "state": state_to_device(_entries(saved["state"], cut), torch.device("cpu"))}
    load_state_by_name(replica.optimizer, replica.parts, optimizer, replica.options)
    if replica.ema:
        average = shared["ema"] or shared["model"]  # a run that starts averaging now
        replica.ema.load_state_dict({name: cut(name, tensor) for name, tensor in average.items()})
    replica.sync.load_state_dict(own["sync"] if own is not None else None, shared["sync"])


def _tensors(replica: Replica, parts: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter of `parts` to save once, tied ones included, and each buffer of the model's state."""
    named = parts.named_parameters()
    yield from ((name, parameter.data) for name, parameter in named if name not in replica.elsewhere)
    persistent = replica.module.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in replica.module.named_buffers() if name in persistent)


def _entries(state: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, dict[str, Any]]:
    """Return what an optimizer keeps for each parameter by name, each entry as `change` returns it."""
    return {name: {key: change(name, value) for key, value in entries.items()} for name, entries in state.items()}


def _as_it_is(name: str, value: Any) -> Any:  # noqa: ARG001 - takes the place of `Shards.whole` and `Shards.cut`
    return value


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
