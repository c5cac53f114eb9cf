"""A replica: one copy of the model in data-parallel training, and its state."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ConfigDict, with_config
from torch import Tensor, nn
from torch.optim import Optimizer

from raytrain.errors import CheckpointError
from raytrain.json_files import parse_json
from raytrain.models.freezing import HalfFineTuning
from raytrain.optim.ema import Average
from raytrain.optim.options import OptimizerOptions
from raytrain.optim.state import load_state_by_name, state_by_name
from raytrain.serialization import canonical_json, state_to_device
from raytrain.sync.shards import Shards
from raytrain.sync.synchroniser import Synchroniser

if TYPE_CHECKING:
    from raytrain.zeroth.step import ZeroOrderStep

Status = Literal["running", "done", "stopped early", "interrupted"]


@with_config(ConfigDict(extra="forbid"))
@dataclass(slots=True)
class Progress:
    """Progress of a run: equal on every replica, and part of every checkpoint.

    Attributes:
        step: optimizer steps done.
        position: examples drawn by all replicas together, which is the sampler's position.
        best: best value of the task's metric.
        best_step: step of the best value.
        stale: evaluations since then.
        evaluated: step of the last evaluation.
        seconds: time spent training, over all attempts.
        data_wait_seconds: how much of it the first replica waited for data.
        bytes_sent: bytes that the first replica put on the wire, over all attempts.
        communication_seconds: how long its exchanges were under way, one after the other.
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
    data_wait_seconds: float = 0.0
    bytes_sent: int = 0
    communication_seconds: float = 0.0
    waited_seconds: float = 0.0
    status: Status = "running"

    def costs(self) -> dict[str, float]:
        """Return what it took so far, as rows of `metrics.jsonl` and `result.json` name it; seconds to milliseconds.

        The overlap ratio is the share of the communication time that was hidden behind computation.
        """
        waited, under_way = self.waited_seconds, self.communication_seconds
        return {
            "data_wait_seconds": round(self.data_wait_seconds, 3),
            "bytes_sent": self.bytes_sent,
            "communication_seconds": round(under_way, 3),
            "overlap_ratio": round(max(0.0, 1 - waited / under_way), 4) if under_way else 0.0,
        }


def progress_to_dict(progress: Progress) -> dict[str, Any]:
    """Return progress as plain data."""
    return {field: getattr(progress, field) for field in Progress.__slots__}


def progress_from_dict(saved: Mapping[str, Any], path: object) -> Progress:
    """Return the progress of `progress_to_dict`.

    Args:
        saved: plain data.
        path: of the checkpoint, for the error message.

    Raises:
        CheckpointError: the data is not of that form.
    """
    return parse_json(canonical_json(dict(saved)), Progress, str(path), CheckpointError)


@dataclass(slots=True)
class Replica:
    """A copy of the model, with its optimizer and synchroniser.

    Attributes:
        module: the model.
        frozen_base: names of the parameters of the pretrained model under an adapter; never trained, and not saved.
        base_digest: SHA-256 of their values, checked on resume.
        half_freezing: half fine-tuning, if enabled.
        optimizer: of the trainable parameters.
        options: of the optimizer.
        ema: average of the weights that is evaluated in their place, if enabled.
        sync: synchroniser.
        progress: of the run.
        device, dtype: of the parameters.
        rank: of this replica.
        world_size: number of replicas.
        shards: shards of this replica, if the model is sharded.
        zero_order: zeroth-order step, if the optimizer takes no gradients.
    """

    module: nn.Module
    frozen_base: frozenset[str]
    base_digest: str
    half_freezing: HalfFineTuning | None
    optimizer: Optimizer
    options: OptimizerOptions
    ema: Average | None
    sync: Synchroniser
    progress: Progress
    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int
    shards: Shards | None = None
    zero_order: "ZeroOrderStep | None" = None

    @property
    def local_parameters(self) -> nn.Module:
        """Parameters of this replica, to step and to average: the model's, or its shards."""
        return self.shards.local if self.shards else self.module


def state_of(replica: Replica) -> dict[str, Any]:
    """Return this replica's part of a checkpoint; that of the first replica includes the shared state.

    There is no random state: the draws of a step follow from seed, rank and step.
    """
    optimizer = state_by_name(replica.optimizer, replica.local_parameters)
    own: dict[str, Any] = {"sync": replica.sync.state_dict()}
    if replica.sync.has_local_state:
        own["optimizer"] = {"name": replica.options.name, **optimizer}
    if replica.rank > 0 and not replica.shards:  # shards are gathered by all replicas
        return own
    whole = replica.shards.gather if replica.shards else _as_it_is
    average = replica.ema.state_dict() if replica.ema else {}
    with replica.sync.synced_parameters():
        model = {name: whole(name, tensor) for name, tensor in _tensors(replica, replica.local_parameters)}
        if replica.sync.has_local_state:
            model = {name: tensor.clone() for name, tensor in model.items()}
    shared = {
        "model": model,
        "base": replica.base_digest,
        "optimizer": {"name": replica.options.name, **optimizer, "state": _entries(optimizer["state"], whole)},
        "ema": {name: whole(name, tensor) for name, tensor in average.items()},
    }
    return {**own, **shared} if replica.rank == 0 else own


def load_model(replica: Replica, shared: Mapping[str, Any], path: object, *, averaged: bool = False) -> None:
    """Load saved parameters and buffers into the model or its shards.

    Args:
        replica: newly built.
        shared: state of the first replica.
        path: of the checkpoint, for the error message.
        averaged: load the average of the weights, if there is one.

    Raises:
        CheckpointError: the checkpoint is of another model; the message names the first difference.
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
    if shared["base"] != replica.base_digest:
        raise CheckpointError(
            f"{path}: this checkpoint is of an adapter on another base model: the weights at task.model are not those "
            "that it was trained on"
        )
    cut = replica.shards.scatter if replica.shards else _as_it_is
    with torch.no_grad():
        for name, tensor in _tensors(replica, replica.local_parameters):
            tensor.copy_(cut(name, saved[name]))


def load_state(replica: Replica, shared: Mapping[str, Any], own: Mapping[str, Any] | None, path: object) -> None:
    """Load the state of a checkpoint into a replica.

    Args:
        replica: newly built.
        shared: state of the first replica.
        own: state of the replica of this rank, or None if the number of replicas changed.
        path: of the checkpoint, for the error message.

    Raises:
        CheckpointError: the state is of another model or optimizer.
    """
    load_model(replica, shared, path)
    if shared["optimizer"]["name"] != replica.options.name:
        raise CheckpointError(
            f"{path}: this checkpoint's optimizer is {shared['optimizer']['name']}, and the recipe's is "
            f"{replica.options.name}; set optimizer.name={shared['optimizer']['name']} to continue"
        )
    cut = replica.shards.scatter if replica.shards else _as_it_is
    apart = replica.sync.has_local_state and own is not None and "optimizer" in own
    saved = own["optimizer"] if own is not None and apart else shared["optimizer"]
    optimizer = {**saved, "state": state_to_device(_entries(saved["state"], cut), torch.device("cpu"))}
    load_state_by_name(replica.optimizer, replica.local_parameters, optimizer, replica.options)
    if replica.ema:
        average = shared["ema"] or shared["model"]  # a run that starts averaging now
        replica.ema.load_state_dict({name: cut(name, tensor) for name, tensor in average.items()})
    replica.sync.load_state_dict(own["sync"] if own is not None else None, shared["sync"])


def inherit(
    replica: Replica,
    shared: Mapping[str, Any],
    own: Mapping[str, Any] | None,
    path: object,
    *,
    reset_optimizer: bool = False,
) -> list[str]:
    """Put of a state what fits into a replica of another recipe, and return the names of weights that are partly new.

    Weights and their averages are taken by name; of a tensor of another shape, the leading block that both have. The
    optimizer's state is taken where shapes agree; that of an optimizer of another name starts new.

    Args:
        replica: newly made.
        shared: what the first replica saved.
        own: as for `load_state`.
        path: where it came from, for the error message.
        reset_optimizer: whether the optimizer's state starts new whatever its name.

    Raises:
        CheckpointError: it is the state of an adapter beside another model.
    """
    new, saved = dict(_tensors(replica, replica.module)), shared["model"]
    whole = {name for name, value in saved.items() if name in new and new[name].shape == value.shape}
    same = shared["optimizer"]["name"] == replica.options.name and not reset_optimizer
    if same and whole == new.keys() == saved.keys():
        load_state(replica, shared, own, path)
        return []
    optimizer = {"name": replica.options.name, **state_by_name(replica.optimizer, replica.local_parameters)}
    if same:
        kept = {name: entries for name, entries in shared["optimizer"]["state"].items() if name in whole}
        optimizer = {**shared["optimizer"], "state": kept}
    full = replica.shards.all_gather if replica.shards else _as_it_is
    weights = {
        name: saved[name] if name in whole else _overlaid(full(name, tensor), saved.get(name))
        for name, tensor in _tensors(replica, replica.local_parameters)
    }
    average = {name: _overlaid(value, shared["ema"].get(name)) for name, value in weights.items()}
    complete = {"model": weights, "optimizer": optimizer, "ema": average if shared["ema"] else {}}
    load_state(replica, {**shared, **complete, "sync": replica.sync.state_dict()}, None, path)
    return sorted(new.keys() - whole)


def _overlaid(tensor: Tensor, other: Tensor | None) -> Tensor:
    """Return a copy of a tensor with the leading block of another one, as far as both reach."""
    copy = tensor.clone()
    if other is not None and other.dim() == tensor.dim():
        copy[tuple(slice(size) for size in other.shape)] = other[tuple(slice(size) for size in tensor.shape)]
    return copy


def _tensors(replica: Replica, parts: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter of `parts` to save, tied ones once, and each persistent buffer of the model."""
    named = parts.named_parameters()
    yield from ((name, parameter.data) for name, parameter in named if name not in replica.frozen_base)
    persistent = replica.module.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in replica.module.named_buffers() if name in persistent)


def _entries(state: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, dict[str, Any]]:
    """Map `change` over the entries of an optimizer state by parameter name."""
    return {name: {key: change(name, value) for key, value in entries.items()} for name, entries in state.items()}


def _as_it_is(name: str, value: Any) -> Any:  # noqa: ARG001 - stands in for `Shards.gather` and `Shards.scatter`
    return value


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
