"""Local updates: replicas take local steps, and average their parameters now and then."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raytrain.sync.averaging import Averager, ExactAverager
from raytrain.sync.buffers import BufferMean, floating_buffers, state_tensors
from raytrain.sync.compression import CompressedAverager
from raytrain.sync.global_momentum import GlobalMomentum
from raytrain.sync.interval import RoundTimer, SyncInterval
from raytrain.sync.outer import OuterOptimizer
from raytrain.sync.synchroniser import StepTotals
from raytrain.sync.transport import CompletedWork, PendingWork

EXTRA_SCALARS = 4
"""Sent with each pseudo-gradient: a stop flag, and seconds of a step, of an all-reduce and of its overhead."""


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
        self._keep_local_progress = keep_local_progress
        self._alpha = alpha
        self._global_momentum = global_momentum
        self._share_buffers = share_buffers
        compressor = averager.compressor if isinstance(averager, CompressedAverager) else None
        parts = (outer.penalty, global_momentum, compressor)
        self._method = " ".join(
            ["2", str(keep_local_progress), str(share_buffers), *(type(part).__name__ for part in parts)]
        )
        self._timer = RoundTimer()
        self._apply_at = 0  # steps of the round after which the average is applied
        self._pending: PendingWork | None = None
        self._steps = 0  # in this round
        self._steps_since_momentum = 0
        self._sent_steps = 0  # in the round that is in flight
        self._samples = 0.0  # in this round
        self._weight = 0.0  # of this step
        self._lr = 1.0  # of this step
        self._stop_requested = False
        self._stop = False
        self._loaded: Mapping[str, Any] | None = None
        self._before: Mapping[str, Any] = {"outer": None, "global_momentum": None, "anchor": None}  # as loaded

    def attach(self, module: nn.Module) -> None:
        """Start a round at the first replica's parameters and buffers, or resume the one that was loaded."""
        for value in state_tensors(module):
            self._await(self._averager.transport.broadcast(value.data))
        parameters = [value for value in module.parameters() if value.requires_grad]
        buffers = floating_buffers(module)
        self._parameters = [value.data for value in parameters]
        self._buffers = BufferMean(buffers if self._share_buffers else [])
        self._own_buffers = [] if self._share_buffers else buffers
        self._size = sum(value.numel() for value in self._parameters)
        self._exact = self._buffers.size + EXTRA_SCALARS
        # Parameters, buffers, scalars, and room for the weight.
        self._message = _flat([*self._parameters, *self._buffers.local], self._size + self._exact + 1)
        self._views = _views(self._message, self._parameters)
        self._pack_parameters()
        self._round_start = self._message[: self._size].clone()
        anchor = self._before["anchor"]
        self._anchor = self._round_start.clone() if anchor is None else anchor.to(self._round_start, copy=True)
        self._outer.reset(self._anchor, self._before["outer"])
        if self._global_momentum:
            self._global_momentum.reset(self._anchor, parameters, self._before["global_momentum"])
        if self._loaded is not None:
            self._restore(self._loaded)
        self._loaded, self._before = None, {}

    def set_weight(self, weight: float) -> float:
        """Return the weight: gradients are of this replica's own mean loss."""
        self._weight = weight
        return weight

    def before_backward(self) -> None:
        """Do nothing: gradients are not sent."""

    def before_step(self, loss: float, stop: bool) -> StepTotals:
        """Return this replica's own totals, and whether to stop as all replicas know."""
        self._stop_requested = self._stop_requested or stop
        return StepTotals(self._weight, loss, self._stop)

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        """Apply the average when it is due, and send the pseudo-gradient at the end of a round."""
        began, waited = time.perf_counter(), self.waited_seconds
        self._lr = lr
        self._steps += 1
        self._steps_since_momentum += 1
        self._samples += self._weight
        if self._steps_since_momentum >= self._interval.momentum_stride:
            self._add_momentum()
        if self._pending is not None:
            self._pending.poll()
            if self._steps >= self._apply_at:
                self._apply(self._pending)
        if self._steps >= self._interval.every:
            pending = self._launch()
            if self._apply_at == 0:
                self._apply(pending)
        self._timer.add_overhead(time.perf_counter() - began - (self.waited_seconds - waited))

    @torch.no_grad()
    def finish(self) -> None:
        """Apply what is in flight, then the plain mean of the steps since; afterwards the replicas are equal."""
        if self._steps:
            self._anchor.sub_(self._receive(self._launch()))
            self._buffers.unpack(self._buffer_message)
        elif self._pending is not None:
            self._apply(self._pending)
        self._round_start.copy_(self._anchor)
        self._set_parameters(self._anchor)
        self._buffers.load()
        if self._own_buffers:
            self._average(self._own_buffers)

    @contextmanager
    def synced_parameters(self) -> Iterator[None]:
        """Put the anchor into the module inside the `with` block."""
        held = [*self._parameters, *self._buffers.local]
        aside = [value.clone() for value in held]
        self._set_parameters(self._anchor)
        self._buffers.load()
        try:
            yield
        finally:
            torch._foreach_copy_(held, aside)

    def metrics(self) -> dict[str, float]:
        """Return the adapted interval and its measurements."""
        return self._interval.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Return this replica's state, after waiting for what is in flight; it is still applied when it is due."""
        mean = None
        if self._pending is not None:
            self._receive(self._pending)
            mean = self._message[: -EXTRA_SCALARS - 1].clone()
            self._pending = CompletedWork(self._message)
        self._copy_parameters(here := torch.empty_like(self._round_start))
        return {
            "method": self._method,
            "steps": self._steps,
            "steps_since_momentum": self._steps_since_momentum,
            "sent_steps": self._sent_steps,
            "samples": self._samples,
            "apply_at": self._apply_at,
            "every": self._interval.every,
            "delay": self._interval.delay,
            "parameters": here,
            "round_start": self._round_start,
            "average": mean,
            "buffers": [value.clone() for value in [*self._buffers.local, *self._own_buffers]],
            "round_start_buffers": [value.clone() for value in self._buffers.round_start],
            "exchange": self._averager.state_dict(),
            "shared": self._shared_state() if self._averager.transport.rank == 0 else None,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None, first: Mapping[str, Any]) -> None:
        """Restore this replica's state.

        With another number of replicas, or after another method, it starts a round at the anchor.
        """
        if first.get("method") == self._method:
            self._loaded, self._before = state, first["shared"]

    def _shared_state(self) -> dict[str, Any]:
        """Return the state that all replicas share; the anchor only where the model has narrower types."""
        global_momentum = self._global_momentum.state_dict() if self._global_momentum else None
        narrow = any(value.dtype != self._anchor.dtype for value in self._parameters)
        return {
            "outer": self._outer.state_dict(),
            "global_momentum": global_momentum,
            "anchor": self._anchor if narrow else None,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._steps, self._samples, self._apply_at = state["steps"], state["samples"], state["apply_at"]
        self._steps_since_momentum, self._sent_steps = state["steps_since_momentum"], state["sent_steps"]
        self._interval.restore(state["every"], state["delay"])
        self._round_start.copy_(state["round_start"])
        self._set_parameters(state["parameters"])
        self._averager.load_state_dict(state["exchange"])
        buffers = [*self._buffers.local, *self._own_buffers, *self._buffers.round_start]
        for value, saved in zip(buffers, [*state["buffers"], *state["round_start_buffers"]], strict=True):
            value.copy_(saved)
        if state["average"] is not None:
            self._message[: -EXTRA_SCALARS - 1].copy_(state["average"])
            self._pending = CompletedWork(self._message)

    def _launch(self) -> PendingWork:
        """Send the pseudo-gradient and start the next round; what is in flight is applied first."""
        if self._pending is not None:
            self._apply(self._pending)
        self._add_momentum()
        self._pack_parameters()
        here = self._message[: self._size]
        torch.sub(self._round_start, here, out=here)
        if self._keep_local_progress:
            self._copy_parameters(self._round_start)
        else:
            self._round_start.copy_(self._anchor)
            self._set_parameters(self._anchor)
        self._buffers.pack(self._buffer_message)
        self._buffers.start_round(keep=self._keep_local_progress)
        numbers = [float(self._stop_requested), *self._timer.end_round(self._steps, self.waited_seconds)]
        self._message[-EXTRA_SCALARS - 1 : -1] = torch.tensor(numbers, dtype=torch.float64)
        self._pending = pending = self._averager.average(self._message, self._samples, exact=self._exact)
        self._sent_steps = self._steps
        self._steps, self._samples, self._apply_at = 0, 0.0, self._interval.delay
        return pending

    def _add_momentum(self) -> None:
        """Apply global momentum for the steps since the last time."""
        if self._global_momentum and self._steps_since_momentum:
            self._global_momentum.apply(self._steps_since_momentum)
        self._steps_since_momentum = 0

    def _apply(self, pending: PendingWork) -> None:
        """Take the outer step, and interpolate the replica toward the anchor."""
        self._add_momentum()
        mean = self._receive(pending)
        alpha = self._interval.alpha(self._apply_at) if self._alpha is None else self._alpha
        if self._global_momentum:
            self._global_momentum.update(mean, self._sent_steps)
        self._outer(mean, self._lr)
        here = mean  # the same memory: the average has been used
        self._pack_parameters()
        here.sub_(self._round_start)
        self._round_start.lerp_(self._anchor, alpha)
        here.add_(self._round_start)
        torch._foreach_copy_(self._parameters, self._views)
        self._buffers.unpack(self._buffer_message)
        if self._keep_local_progress or not self._steps:
            self._buffers.approach(alpha)

    @property
    def _buffer_message(self) -> Tensor:
        """The buffers' part of the message."""
        return self._message[self._size : self._size + self._buffers.size]

    def _receive(self, pending: PendingWork) -> Tensor:
        """Wait for the average, and return the averaged pseudo-gradient, shape (n,)."""
        self._await(pending)
        if pending.seconds:
            self._timer.exchange_seconds = pending.seconds
        self._pending = None
        asked, *measured = self._message[-EXTRA_SCALARS - 1 : -1].tolist()
        self._stop = self._stop or asked > 0
        self._interval.update(*measured)
        return self._message[: self._size]

    def _average(self, buffers: Sequence[Tensor]) -> None:
        """Average buffers over the replicas with equal weights."""
        mean = BufferMean(buffers)
        for value in mean.anchor:
            self._await(self._averager.transport.broadcast(value))
        message = _flat(buffers, mean.size + 1)
        mean.pack(message[:-1])
        self._await(ExactAverager(self._averager.transport).average(message, 1.0))
        mean.unpack(message[:-1])
        mean.load()

    def _pack_parameters(self) -> None:
        """Copy the parameters into the message."""
        torch._foreach_copy_(self._views, self._parameters)

    def _copy_parameters(self, flat: Tensor) -> None:
        torch._foreach_copy_(_views(flat, self._parameters), self._parameters)

    def _set_parameters(self, flat: Tensor) -> None:
        torch._foreach_copy_(self._parameters, _views(flat, self._parameters))

    def _await(self, pending: PendingWork) -> None:
        started = time.perf_counter()
        pending.wait()
        self.waited_seconds += time.perf_counter() - started
        self.exchange_seconds += pending.seconds
        self.bytes_sent += pending.bytes_sent


def _flat(tensors: Sequence[Tensor], size: int) -> Tensor:
    """Return zeros, shape (size,), of the widest type of `tensors`, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.zeros(size, dtype=dtype, device=tensors[0].device)


def _views(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return views into `flat` in the shapes of `tensors`."""
    parts = flat[: sum(tensor.numel() for tensor in tensors)].split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
