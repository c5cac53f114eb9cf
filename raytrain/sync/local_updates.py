"""Local updates: replicas step on their own, and now and then share what it came to."""

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
"""What travels with the differences: a wish to stop, and what a step and an exchange take."""


class LocalUpdates:
    """Exchange how far each replica got every so many steps, and apply the mean some steps later.

    At a round's end a replica sends the difference between where its round began and where it is, notes where that is,
    and goes on. When the mean is due, the shared point X takes an outer step, and the replica moves by pull * (X -
    where it was when it sent): its movement meanwhile is kept, and becomes part of its next difference. With delay 0
    and pull 1 that is DiLoCo, SlowMo or local SGD, by the outer step; with a delay of a whole round and no momentum
    CoCoD-SGD (Shen et al. 2019). Without `keep` a replica goes on from X when it has sent, and what it did comes back
    with the mean only: a round late, that is CO2 (Sun et al. 2024). A mean is applied before the next one is sent,
    however late it was to be.

    All this is of parameters. A shared buffer is the mean of the replicas' at the end of a round, whatever the outer
    step; see `BufferMean`.

    Args:
        averager: the replicas.
        outer: the outer step.
        interval: steps in a round, and from sending to applying.
        keep_local_progress: whether a replica goes on from where it is.
        alpha: how far it comes to X when the mean arrives, 1: all the way; None: as `SyncInterval.pull` says.
        global_momentum: by which replicas move beside their own steps.
        share_buffers: whether buffers are averaged too, and not only at the end.
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
        self._format = " ".join(
            ["2", str(keep_local_progress), str(share_buffers), *(type(part).__name__ for part in parts)]
        )
        self._timer = RoundTimer()
        self._apply_at = 0  # steps of the next round after which the mean is applied
        self._pending: PendingWork | None = None
        self._steps = 0  # since the round's start
        self._steps_since_momentum = 0  # steps for which the velocity has not been added
        self._sent_steps = 0  # of the round that is under way
        self._samples = 0.0  # in this round
        self._weight = 0.0  # of this step
        self._lr = 1.0  # of this step
        self._stop_requested = False
        self._stop = False
        self._loaded: Mapping[str, Any] | None = None
        self._before: Mapping[str, Any] = {"outer": None, "velocity": None, "point": None}  # that were loaded

    def attach(self, module: nn.Module) -> None:
        """Begin a round at the first replica's parameters and buffers, or go on with the one that was loaded."""
        for value in state_tensors(module):
            self._await(self._averager.transport.broadcast(value.data))
        parameters = [value for value in module.parameters() if value.requires_grad]
        buffers = floating_buffers(module)
        self._parameters = [value.data for value in parameters]
        self._buffers = BufferMean(buffers if self._share_buffers else [])
        self._own_buffers = [] if self._share_buffers else buffers
        self._size = sum(value.numel() for value in self._parameters)
        self._exact = self._buffers.size + EXTRA_SCALARS
        # Parameters, buffers, numbers, and room for the weight.
        self._message = _flat([*self._parameters, *self._buffers.local], self._size + self._exact + 1)
        self._views = _views(self._message, self._parameters)
        self._pack_parameters()
        self._round_start = self._message[: self._size].clone()
        point = self._before["point"]
        self._anchor = self._round_start.clone() if point is None else point.to(self._round_start, copy=True)
        self._outer.reset(self._anchor, self._before["outer"])
        if self._global_momentum:
            self._global_momentum.reset(self._anchor, parameters, self._before["velocity"])
        if self._loaded is not None:
            self._restore(self._loaded)
        self._loaded, self._before = None, {}

    def set_weight(self, weight: float) -> float:
        """Return the weight itself: the gradient is that of this replica's own mean."""
        self._weight = weight
        return weight

    def before_backward(self) -> None:
        """Do nothing: gradients stay here."""

    def before_step(self, loss: float, stop: bool) -> StepTotals:
        """Return what this replica's own step came to, and whether a replica asked to stop, as far as all know."""
        self._stop_requested = self._stop_requested or stop
        return StepTotals(self._weight, loss, self._stop)

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        """Apply what is due, and send what a round came to."""
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
        """Apply what is under way, and the plain mean of what was done since; afterwards the replicas are equal."""
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
        """Let the module hold the point that all replicas share inside the `with` block."""
        held = [*self._parameters, *self._buffers.local]
        aside = [value.clone() for value in held]
        self._set_parameters(self._anchor)
        self._buffers.load()
        try:
            yield
        finally:
            torch._foreach_copy_(held, aside)

    def metrics(self) -> dict[str, float]:
        """Return the pace and what it was chosen from, if it is chosen."""
        return self._interval.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Return where this replica is, and what is under way, after waiting for it: it is not applied earlier."""
        mean = None
        if self._pending is not None:
            self._receive(self._pending)
            mean = self._message[: -EXTRA_SCALARS - 1].clone()
            self._pending = CompletedWork(self._message)
        self._copy_parameters(here := torch.empty_like(self._round_start))
        return {
            "form": self._format,
            "steps": self._steps,
            "still": self._steps_since_momentum,
            "sent_steps": self._sent_steps,
            "samples": self._samples,
            "due": self._apply_at,
            "every": self._interval.every,
            "delay": self._interval.delay,
            "here": here,
            "begun": self._round_start,
            "mean": mean,
            "buffers": [value.clone() for value in [*self._buffers.local, *self._own_buffers]],
            "begun_buffers": [value.clone() for value in self._buffers.round_start],
            "exchange": self._averager.state_dict(),
            "shared": self._shared_state() if self._averager.transport.rank == 0 else None,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None, first: Mapping[str, Any]) -> None:
        """Take where this replica was.

        Among more or fewer replicas, or where the run was kept together in another form, it begins a round at the
        shared point.
        """
        if first.get("form") == self._format:
            self._loaded, self._before = state, first["shared"]

    def _shared_state(self) -> dict[str, Any]:
        """Return what is equal on all replicas; the shared point only where the model is of narrower types."""
        global_momentum = self._global_momentum.state_dict() if self._global_momentum else None
        narrow = any(value.dtype != self._anchor.dtype for value in self._parameters)
        return {
            "outer": self._outer.state_dict(),
            "velocity": global_momentum,
            "point": self._anchor if narrow else None,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._steps, self._samples, self._apply_at = state["steps"], state["samples"], state["due"]
        self._steps_since_momentum, self._sent_steps = state["still"], state["sent_steps"]
        self._interval.restore(state["every"], state["delay"])
        self._round_start.copy_(state["begun"])
        self._set_parameters(state["here"])
        self._averager.load_state_dict(state["exchange"])
        buffers = [*self._buffers.local, *self._own_buffers, *self._buffers.round_start]
        for value, saved in zip(buffers, [*state["buffers"], *state["begun_buffers"]], strict=True):
            value.copy_(saved)
        if state["mean"] is not None:
            self._message[: -EXTRA_SCALARS - 1].copy_(state["mean"])
            self._pending = CompletedWork(self._message)

    def _launch(self) -> PendingWork:
        """Send how far this replica got in its round, and begin the next one; what is under way is applied before."""
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
        """Add the velocity for the steps since this was done last."""
        if self._global_momentum and self._steps_since_momentum:
            self._global_momentum.apply(self._steps_since_momentum)
        self._steps_since_momentum = 0

    def _apply(self, pending: PendingWork) -> None:
        """Take the outer step, and go on from there with what was done since this was sent."""
        self._add_momentum()
        mean = self._receive(pending)
        alpha = self._interval.alpha(self._apply_at) if self._alpha is None else self._alpha
        if self._global_momentum:
            self._global_momentum.update(mean, self._sent_steps)
        self._outer(mean, self._lr)
        here = mean  # which is used up
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
        """The part of the message that is of buffers."""
        return self._message[self._size : self._size + self._buffers.size]

    def _receive(self, pending: PendingWork) -> Tensor:
        """Wait for the mean, and return that of the differences, shape (n,)."""
        self._await(pending)
        if pending.seconds:
            self._timer.exchange_seconds = pending.seconds
        self._pending = None
        asked, *measured = self._message[-EXTRA_SCALARS - 1 : -1].tolist()
        self._stop = self._stop or asked > 0
        self._interval.update(*measured)
        return self._message[: self._size]

    def _average(self, buffers: Sequence[Tensor]) -> None:
        """Give buffers the mean of the replicas', each of which counts as much."""
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
    """Return room for `size` numbers of the widest type of `tensors`, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.zeros(size, dtype=dtype, device=tensors[0].device)


def _views(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of `flat`, in the shapes of `tensors`."""
    parts = flat[: sum(tensor.numel() for tensor in tensors)].split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
