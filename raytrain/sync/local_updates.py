"""Local updates: replicas take local steps, and average their parameters now and then."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from raytrain.sync.averaging import Averager, ExactAverager
from raytrain.sync.buffers import BufferMean, state_tensors
from raytrain.sync.compression import CompressedAverager
from raytrain.sync.global_momentum import GlobalMomentum
from raytrain.sync.interval import RoundTimer, SyncInterval
from raytrain.sync.outer import OuterOptimizer
from raytrain.sync.round_state import ReplicaVectors, RoundState, flat_zeros
from raytrain.sync.synchroniser import StepTotals
from raytrain.sync.transport import CompletedWork, PendingWork


@dataclass(frozen=True)
class UpdateRule:
    """How an average reaches a replica.

    Attributes:
        keep_local_progress: whether the steps since sending stay in the parameters.
        alpha: interpolation weight toward the anchor; None: that of `SyncInterval.alpha`.
        share_buffers: whether buffers are averaged in each round, and not only at the end.
    """

    keep_local_progress: bool
    alpha: float | None
    share_buffers: bool


@dataclass
class StopVote:
    """Whether this replica asks for the end, and whether all replicas know that one does."""

    requested: bool = False
    agreed: bool = False


@dataclass(frozen=True)
class SavedState:
    """A checkpoint that is loaded before the replica is attached.

    Attributes:
        replica: this replica's part; None: it starts a round at the anchor.
        shared: the part that all replicas share.
    """

    replica: Mapping[str, Any] | None
    shared: Mapping[str, Any]


NOTHING_SAVED = SavedState(None, {"outer": None, "global_momentum": None, "anchor": None})


class LocalUpdates:
    """Local-update training with an optionally delayed outer step.

    Every `every` steps a replica all-reduces its pseudo-gradient (round start minus current parameters)
    asynchronously. `delay` steps later the outer optimizer updates the anchor X, and the replica is interpolated toward
    it:

        w <- w + alpha * (X - w_sent)

    With `keep_local_progress`, the steps since sending stay in w and become part of the next pseudo-gradient: delay 0
    and alpha 1 is local SGD, SlowMo or DiLoCo, by the outer optimizer; a delay of a round without momentum is CoCoD-SGD
    (Shen et al. 2019). Without it, a replica restarts from X after sending, and its progress returns with the average,
    a round late: CO2 (Sun et al. 2024). An average is applied before the next pseudo-gradient is sent, whatever the
    delay.

    This holds for parameters. Buffers are averaged at the end of a round, whatever the outer optimizer; see
    `BufferMean`.

    Args:
        averager: over the replicas.
        outer: outer optimizer.
        interval: steps in a round, and delay.
        keep_local_progress: whether steps since sending stay in w.
        alpha: interpolation weight; None: that of `SyncInterval.alpha`.
        global_momentum: added to local steps.
        share_buffers: whether buffers are averaged in each round, and not only at the end.
    """

    has_local_state = True

    def __init__(
        self,
        averager: Averager,
        outer: OuterOptimizer,
        interval: SyncInterval,
        *,
        keep_local_progress: bool,
        alpha: float | None = 1.0,
        global_momentum: GlobalMomentum | None = None,
        share_buffers: bool = True,
    ) -> None:
        self.bytes_sent = 0
        self.waited_seconds = 0.0
        self.exchange_seconds = 0.0
        self._averager = averager
        self._outer = outer
        self._interval = interval
        self._global_momentum = global_momentum
        self._rule = UpdateRule(keep_local_progress, alpha, share_buffers)
        compressor = averager.compressor if isinstance(averager, CompressedAverager) else None
        parts = (outer.penalty, global_momentum, compressor)
        self._method = " ".join(
            ["2", str(keep_local_progress), str(share_buffers), *(type(part).__name__ for part in parts)]
        )
        self._timer = RoundTimer()
        self._round = RoundState()
        self._pending: PendingWork | None = None
        self._stop = StopVote()
        self._weight = 0.0  # of this step
        self._lr = 1.0  # of this step
        self._saved = NOTHING_SAVED

    def attach(self, module: nn.Module) -> None:
        """Start a round at the first replica's parameters and buffers, or resume the one that was loaded."""
        for value in state_tensors(module):
            self._await(self._averager.transport.broadcast(value.data))
        self._replica = replica = ReplicaVectors(module, share_buffers=self._rule.share_buffers)
        shared = self._saved.shared
        if shared["anchor"] is not None:
            replica.anchor = shared["anchor"].to(replica.anchor, copy=True)
        self._outer.reset(replica.anchor, shared["outer"])
        if self._global_momentum:
            parameters = [value for value in module.parameters() if value.requires_grad]
            self._global_momentum.reset(replica.anchor, parameters, shared["global_momentum"])
        if self._saved.replica is not None:
            self._restore(self._saved.replica)
        self._saved = NOTHING_SAVED

    def set_weight(self, weight: float) -> float:
        """Return the weight: gradients are of this replica's own mean loss."""
        self._weight = weight
        return weight

    def before_backward(self) -> None:
        """Do nothing: gradients are not sent."""

    def before_step(self, loss: float, stop: bool) -> StepTotals:
        """Return this replica's own totals, and whether to stop as all replicas know."""
        self._stop.requested = self._stop.requested or stop
        return StepTotals(self._weight, loss, self._stop.agreed)

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        """Apply the average when it is due, and send the pseudo-gradient at the end of a round."""
        began, waited = time.perf_counter(), self.waited_seconds
        self._lr = lr
        self._round.add_step(self._weight)
        if self._round.steps_since_momentum >= self._interval.momentum_stride:
            self._add_momentum()
        if self._pending is not None:
            self._pending.poll()
            if self._round.steps >= self._round.apply_at:
                self._apply(self._pending)
        if self._round.steps >= self._interval.every:
            pending = self._launch()
            if self._round.apply_at == 0:
                self._apply(pending)
        self._timer.add_overhead(time.perf_counter() - began - (self.waited_seconds - waited))

    @torch.no_grad()
    def finish(self) -> None:
        """Apply what is in flight, then the plain mean of the steps since; afterwards the replicas are equal."""
        replica = self._replica
        if self._round.steps:
            replica.anchor.sub_(self._receive(self._launch()))
            replica.buffers.unpack(replica.buffer_message)
        elif self._pending is not None:
            self._apply(self._pending)
        replica.round_start.copy_(replica.anchor)
        replica.write(replica.anchor)
        replica.buffers.load()
        if replica.own_buffers:
            self._average(replica.own_buffers)

    @contextmanager
    def synced_parameters(self) -> Iterator[None]:
        """Put the anchor into the module inside the `with` block."""
        replica = self._replica
        held = [*replica.parameters, *replica.buffers.local]
        aside = [value.clone() for value in held]
        replica.write(replica.anchor)
        replica.buffers.load()
        try:
            yield
        finally:
            torch._foreach_copy_(held, aside)

    def metrics(self) -> dict[str, float]:
        """Return the adapted interval and its measurements."""
        return self._interval.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Return this replica's state, after waiting for what is in flight; it is still applied when it is due."""
        replica, mean = self._replica, None
        if self._pending is not None:
            self._receive(self._pending)
            mean = replica.average.clone()
            self._pending = CompletedWork(replica.message)
        replica.read(here := torch.empty_like(replica.round_start))
        return {
            "method": self._method,
            **asdict(self._round),
            "every": self._interval.every,
            "delay": self._interval.delay,
            "parameters": here,
            "round_start": replica.round_start,
            "average": mean,
            "buffers": [value.clone() for value in [*replica.buffers.local, *replica.own_buffers]],
            "round_start_buffers": [value.clone() for value in replica.buffers.round_start],
            "exchange": self._averager.state_dict(),
            "shared": self._shared_state() if self._averager.transport.rank == 0 else None,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None, first: Mapping[str, Any]) -> None:
        """Restore this replica's state.

        With another number of replicas, or after another method, it starts a round at the anchor.
        """
        if first.get("method") == self._method:
            self._saved = SavedState(state, first["shared"])

    def _shared_state(self) -> dict[str, Any]:
        """Return the state that all replicas share; the anchor only where the model has narrower types."""
        global_momentum = self._global_momentum.state_dict() if self._global_momentum else None
        anchor = self._replica.anchor
        narrow = any(value.dtype != anchor.dtype for value in self._replica.parameters)
        return {
            "outer": self._outer.state_dict(),
            "global_momentum": global_momentum,
            "anchor": anchor if narrow else None,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        replica = self._replica
        self._round = RoundState(**{field.name: state[field.name] for field in fields(RoundState)})
        self._interval.restore(state["every"], state["delay"])
        replica.round_start.copy_(state["round_start"])
        replica.write(state["parameters"])
        self._averager.load_state_dict(state["exchange"])
        buffers = [*replica.buffers.local, *replica.own_buffers, *replica.buffers.round_start]
        for value, saved in zip(buffers, [*state["buffers"], *state["round_start_buffers"]], strict=True):
            value.copy_(saved)
        if state["average"] is not None:
            replica.average.copy_(state["average"])
            self._pending = CompletedWork(replica.message)

    def _launch(self) -> PendingWork:
        """Send the pseudo-gradient and start the next round; what is in flight is applied first."""
        if self._pending is not None:
            self._apply(self._pending)
        self._add_momentum()
        replica, keep = self._replica, self._rule.keep_local_progress
        replica.pack()
        torch.sub(replica.round_start, replica.pseudo_gradient, out=replica.pseudo_gradient)
        if keep:
            replica.read(replica.round_start)
        else:
            replica.round_start.copy_(replica.anchor)
            replica.write(replica.anchor)
        replica.buffers.pack(replica.buffer_message)
        replica.buffers.start_round(keep=keep)
        measured = self._timer.end_round(self._round.steps, self.waited_seconds)
        replica.scalars.copy_(torch.tensor([float(self._stop.requested), *measured], dtype=torch.float64))
        self._pending = pending = self._averager.average(replica.message, self._round.samples, exact=replica.exact)
        self._round.start_next(self._interval.delay)
        return pending

    def _add_momentum(self) -> None:
        """Apply global momentum for the steps since the last time."""
        if self._global_momentum and self._round.steps_since_momentum:
            self._global_momentum.apply(self._round.steps_since_momentum)
        self._round.steps_since_momentum = 0

    def _apply(self, pending: PendingWork) -> None:
        """Take the outer step, and interpolate the replica toward the anchor.

        With s the round's start before: s' = s + alpha * (X - s), w <- w + (s' - s), s <- s'.
        """
        self._add_momentum()
        replica, mean = self._replica, self._receive(pending)
        alpha = self._interval.alpha(self._round.apply_at) if self._rule.alpha is None else self._rule.alpha
        if self._global_momentum:
            self._global_momentum.update(mean, self._round.sent_steps)
        self._outer(mean, self._lr)
        replica.pack()  # over the average, which has been used
        since_start = replica.pseudo_gradient.sub_(replica.round_start)
        replica.round_start.lerp_(replica.anchor, alpha)
        since_start.add_(replica.round_start)
        replica.unpack()
        replica.buffers.unpack(replica.buffer_message)
        if self._rule.keep_local_progress or not self._round.steps:
            replica.buffers.approach(alpha)

    def _receive(self, pending: PendingWork) -> Tensor:
        """Wait for the average, and return the averaged pseudo-gradient, shape (n,)."""
        self._await(pending)
        if pending.seconds:
            self._timer.exchange_seconds = pending.seconds
        self._pending = None
        asked, *measured = self._replica.scalars.tolist()
        self._stop.agreed = self._stop.agreed or asked > 0
        self._interval.update(*measured)
        return self._replica.pseudo_gradient

    def _average(self, buffers: Sequence[Tensor]) -> None:
        """Average buffers over the replicas with equal weights."""
        mean = BufferMean(buffers)
        for value in mean.anchor:
            self._await(self._averager.transport.broadcast(value))
        message = flat_zeros(buffers, mean.size + 1)
        mean.pack(message[:-1])
        self._await(ExactAverager(self._averager.transport).average(message, 1.0))
        mean.unpack(message[:-1])
        mean.load()

    def _await(self, pending: PendingWork) -> None:
        started = time.perf_counter()
        pending.wait()
        self.waited_seconds += time.perf_counter() - started
        self.exchange_seconds += pending.seconds
        self.bytes_sent += pending.bytes_sent
