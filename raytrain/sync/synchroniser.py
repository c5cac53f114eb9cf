"""The protocol of synchronisers, which the training loop calls to keep replicas together."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from raytrain.sync.transport import PendingWork


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Totals of a step, over the replicas that all-reduced it.

    Attributes:
        weight: sum of loss weights.
        loss: sum of weight * loss.
        stop: whether any replica requested to stop after this step; equal on all of them.
    """

    weight: float
    loss: float
    stop: bool


class Synchroniser(Protocol):
    """Keeps replicas together, by explicit calls in the training loop.

    Attributes:
        has_local_state: whether replicas differ between averages, so that each saves a state of its own.
        bytes_sent: by this replica since `attach`.
        exchange_seconds: sum of the durations of its collectives since `attach`.
        waited_seconds: time the loop was blocked in collectives since `attach`.
    """

    has_local_state: bool
    bytes_sent: int
    exchange_seconds: float
    waited_seconds: float

    def attach(self, module: nn.Module) -> None:
        """Attach to a replica's model, and broadcast parameters and buffers of the first replica."""
        ...

    def set_weight(self, weight: float) -> float:
        """Set the weight of this replica's losses in a step, before its first backward pass.

        Returns:
            Divisor of the sum of weight * loss before each backward pass.
        """
        ...

    def before_backward(self) -> None:
        """Prepare for the last backward pass of the step."""
        ...

    def before_step(self, loss: float, stop: bool) -> StepTotals:
        """Synchronise gradients before the optimizer step.

        Args:
            loss: sum of weight * loss on this replica.
            stop: whether this replica requests all to stop after this step.
        """
        ...

    def after_step(self, lr: float) -> None:
        """Synchronise parameters after the optimizer step.

        Args:
            lr: learning rate of the step, or anything proportional to it: only its changes count.
        """
        ...

    def finish(self) -> None:
        """Complete what is in flight; afterwards the replicas are equal."""
        ...

    def synced_parameters(self) -> AbstractContextManager[None]:
        """Put the synchronised parameters into the module inside the `with` block, to evaluate and save them."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return values for the log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return this replica's state beside the model, as nested plain data and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any] | None, first: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, before `attach`.

        Args:
            state: of this replica; None if the number of replicas changed.
            first: of the first replica.
        """
        ...


class StepSynchroniser:
    """Base of synchronisers whose replicas are equal after every step: nothing in flight, no state."""

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
        """Change nothing: replicas are equal."""
        return nullcontext()

    def metrics(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any] | None, first: Mapping[str, Any]) -> None:
        """Do nothing."""

    def _await(self, pending: PendingWork) -> None:
        started = time.perf_counter()
        pending.wait()
        self.waited_seconds += time.perf_counter() - started
        self.exchange_seconds += pending.seconds
        self.bytes_sent += pending.bytes_sent
