"""Synchronisers for a training loop of the user's own: hooks on its optimizer.

    with DiLoCo(model, optimizer, sync_every=48) as sync:
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            optimizer.step()  # and now and then an exchange

The loop runs in each process of a `torch.distributed` group, as `torchrun` starts them. Each class is a synchroniser of
a recipe (`raytrain list synchronisers`) with the same options, and takes the same steps to the bit. Models that are
sharded (`sync.name = "fsdp"`) are wrapped before their optimizer exists; torch's `fully_shard` does that.
"""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn
from torch.optim import Optimizer

from raytrain.errors import RecipeError
from raytrain.recipe import explain_errors
from raytrain.registry import resolve
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.options import SYNC_OPTIONS, SYNCHRONISERS, SyncOptions
from raytrain.sync.synchroniser import Synchroniser
from raytrain.sync.transport import GroupTransport, LocalTransport, Transport


class LoopSynchroniser:
    """Keeps replicas together inside a `with` block around a training loop.

    On entry all replicas take the parameters and buffers of the first one. When the block ends without an error they
    are equal again, at the parameters that are to be evaluated and saved. All replicas take equally many steps.

    Args:
        model: the replica, on its device.
        optimizer: of its parameters; `step` is called without a closure.
        transport: to the other replicas; None: the default group of `torch.distributed`, if there is one.
        options: of the synchroniser, as in a recipe's section [sync].

    Attributes:
        synchroniser: which the hooks call, with its costs and metrics.
        weight: of this replica in averages, such as the number of examples in its batch; set it before a step.
        should_stop: whether a replica has called `request_stop`; equal on all of them.

    Raises:
        RecipeError: an option is wrong, or `torch.distributed` is not initialized in a process of `torchrun`.
    """

    name: ClassVar[str]
    """Of the synchroniser in a recipe."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, transport: Transport | None = None, **options: Any
    ) -> None:
        parsed = self._parse(options)
        self.weight = 1.0
        self.should_stop = False
        self._stop_requested = False
        self._model = model
        self._optimizer = optimizer
        self._own = transport is None
        self._transport = transport or join_replicas(next(model.parameters()).device, parsed.timeout_seconds)
        make = resolve(SYNCHRONISERS, self.name, "sync.name")
        self.synchroniser: Synchroniser = make(ExactAverager(self._transport), parsed)

    def _parse(self, options: Mapping[str, Any]) -> SyncOptions:
        try:
            return SYNC_OPTIONS[self.name].model_validate({"name": self.name, **options})
        except ValidationError as error:
            raise RecipeError(explain_errors(error, type(self).__name__)) from None

    def __enter__(self) -> Self:
        """Make the replicas equal, and register the hooks."""
        self.synchroniser.attach(self._model)
        before = self._optimizer.register_step_pre_hook(self._before_step)
        self._hooks = [before, self._optimizer.register_step_post_hook(self._after_step)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks; without an error, complete what is in flight."""
        for hook in self._hooks:
            hook.remove()
        try:
            if error is None:
                self.synchroniser.finish()
        finally:
            if self._own:
                self._transport.close()

    def request_stop(self) -> None:
        """Ask all replicas to stop; `should_stop` tells when all of them know."""
        self._stop_requested = True

    def synced_parameters(self) -> AbstractContextManager[None]:
        """Put the parameters that all replicas share into the model inside the `with` block, to evaluate and save."""
        return self.synchroniser.synced_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of this replica's state beside model and optimizer, to resume in the middle of a round."""
        return copy.deepcopy(self.synchroniser.state_dict())

    def load_state_dict(self, state: Mapping[str, Any] | None, first: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, before the `with` block.

        Args:
            state: of this replica; None if the number of replicas changed.
            first: of the first replica.
        """
        self.synchroniser.load_state_dict(state, first)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        if len(args) > 1 or kwargs.get("closure"):  # the first one is the optimizer
            raise TypeError(f"{type(self).__name__}: optimizer.step takes no closure here; call backward() before it")
        self.synchroniser.set_weight(self.weight)
        self.synchroniser.before_backward()
        self.should_stop = self.synchroniser.before_step(0.0, self._stop_requested).stop

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        self.synchroniser.after_step(float(optimizer.param_groups[0]["lr"]))


class DDP(LoopSynchroniser):
    """The exact weighted mean of gradients in every step, sent when the optimizer steps.

    For an all-reduce that overlaps the backward pass wrap the model in torch's DistributedDataParallel instead.
    """

    name = "ddp"


class LocalSGD(LoopSynchroniser):
    """Local SGD (Stich 2019): replicas average their parameters every `sync_every` steps.

    Args:
        model: the replica, on its device.
        optimizer: of its parameters.
        sync_every: local steps in a round; "auto", for `DelayedAveraging` only, measures the shortest one that hides
            the all-reduce.
        transport: to the other replicas; None: the default group of `torch.distributed`, if there is one.
        options: of the synchroniser, as in a recipe's section [sync].

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with DiLoCo(model, optimizer, sync_every=48) as sync:
    ...     for _ in range(96):
    ...         optimizer.zero_grad()
    ...         model(torch.ones(4, 2)).square().mean().backward()
    ...         optimizer.step()
    """

    name = "local-sgd"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        sync_every: int | Literal["auto"] = 12,
        *,
        transport: Transport | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, optimizer, transport=transport, every=sync_every, **options)


class SlowMo(LocalSGD):
    """SlowMo (Wang et al. 2020): outer momentum that scales with the learning rate."""

    name = "slowmo"


class DiLoCo(LocalSGD):
    """DiLoCo (Douillard et al. 2023): outer SGD with Nesterov momentum."""

    name = "diloco"


class CoCoD(LocalSGD):
    """CoCoD-SGD (Shen et al. 2019): averaging one round late, while the next round is computed."""

    name = "cocod"


class DelayedAveraging(LocalSGD):
    """Averaging some steps late, with global momentum at each local step."""

    name = "delayed-averaging"


class CO2(LocalSGD):
    """CO2 (Sun et al. 2024): outer momentum one round late, over a staleness penalty."""

    name = "co2"


def join_replicas(device: torch.device, timeout_seconds: float) -> Transport:
    """Return the transport of a process to the other processes of the default group; without one it is alone.

    Args:
        device: of all tensors.
        timeout_seconds: of a collective.

    Raises:
        RecipeError: `torchrun` started this process, and the group does not exist yet.
    """
    if dist.is_initialized():
        return GroupTransport(device, timeout_seconds) if dist.get_world_size() > 1 else LocalTransport(device)
    if dist.is_torchelastic_launched():
        raise RecipeError(
            "torch.distributed: expected a process group, because torchrun started this process; got none; call "
            "torch.distributed.init_process_group first"
        )
    return LocalTransport(device)
