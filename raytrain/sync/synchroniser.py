"""What the training loop calls to keep replicas together."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from raytrain.sync.transport import PendingWork


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What one step came to, over the replicas that it was exchanged with.

    Attributes:
        weight: sum of the weights of the losses.
        loss: sum of weight * loss.
        stop: whether any replica asked to stop after this step; equal on all of them.
    """

    weight: float
    loss: float
    stop: bool


class Synchroniser(Protocol):
    """Keeps replicas together through visible calls in the loop.

    Attributes:
        has_local_state: whether replicas differ between exchanges, so that each has a state of its own to save.
        bytes_sent: what this replica has put on the wire since `start`.
        exchange_seconds: how long its exchanges were under way since `start`, one after the other.
        waited_seconds: how long the loop has stood still for others since `start`.
    """

    has_local_state: bool
    bytes_sent: int
    exchange_seconds: float
    waited_seconds: float

    def attach(self, module: nn.Module) -> None:
        """Take the replica's parameters and buffers in hand; afterwards they equal those of the first replica."""
        ...

    def set_weight(self, weight: float) -> float:
        """Learn the weight of this replica's losses in a step, before its first backward pass.

        Returns:
            What the sum of weight * loss is to be divided by before each backward pass.
        """
        ...

    def before_backward(self) -> None:
        """Learn that the last backward pass of the step comes next."""
        ...

    def before_step(self, loss: float, stop: bool) -> StepTotals:
        """Make the gradients ready for the optimizer.

        Args:
            loss: sum of weight * loss of this replica's share.
            stop: whether this replica asks all to stop after this step.
        """
        ...

    def after_step(self, lr: float) -> None:
        """Learn that the parameters moved.

        Args:
            lr: the learning rate that they moved by, or anything in proportion to it: what counts is how it changes.
        """
        ...

    def finish(self) -> None:
        """Complete what is under way; afterwards the replicas are equal."""
        ...

    def synced_parameters(self) -> AbstractContextManager[None]:
        """Let the module hold what is equal on all replicas inside the `with` block, to measure and to save it."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return what was decided along the way and belongs into the log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what this replica needs to resume beside what is shared, as nested plain data and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any] | None, first: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned, before `start`.

        Args:
            state: on this replica; None if there were more or fewer replicas then.
            first: on the first one.
        """
        ...


class StepSynchroniser:
    """The part of a synchroniser that has replicas equal after every step: nothing is under way, nothing is kept."""

    has_local_state = False

    def __init__(self) -> None:
        self.bytes_sent = 0
        self.exchange_seconds = 0.0
        self.waited_seconds = 0.0

    def after_step(self, lr: float) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def synced_parameters(self) -> AbstractContextManager[None]:
        """Change nothing: all is equal."""
        return nullcontext()

    def metrics(self) -> dict[str, float]:
        """Return nothing: nothing is decided."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any] | None, first: Mapping[str, Any]) -> None:
        """Take nothing."""

    def _await(self, pending: PendingWork) -> None:
        started = time.perf_counter()
        pending.wait()
        self.waited_seconds += time.perf_counter() - started
        self.exchange_seconds += pending.seconds
        self.bytes_sent += pending.bytes_sent
