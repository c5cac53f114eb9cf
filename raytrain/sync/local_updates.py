"""Local updates: replicas step on their own, and now and then share what it came to."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raytrain.sync.averaging import ExactExchange, Exchange
from raytrain.sync.buffers import BufferMean, floating_buffers, persistent
from raytrain.sync.compression import CompressedExchange
from raytrain.sync.global_momentum import Velocity
from raytrain.sync.interval import Clock, Pace
from raytrain.sync.outer import OuterStep
from raytrain.sync.synchroniser import Totals
from raytrain.sync.transport import Arrived, Pending

NUMBERS = 4
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
        exchange: the replicas.
        outer: the outer step.
        pace: steps in a round, and from sending to applying.
        keep: whether a replica goes on from where it is.
        pull: how far it comes to X when the mean arrives, 1: all the way; None: as `Pace.pull` says.
        velocity: by which replicas move beside their own steps.
        share_buffers: whether buffers are averaged too, and not only at the end.
    """

    apart = True

    def __init__(
        self,
        exchange: Exchange,
        outer: OuterStep,
        pace: Pace,
        *,
        keep: bool,
        pull: float | None = 1.0,
        velocity: Velocity | None = None,
        share_buffers: bool = True,
    ) -> None:
        self.bytes_sent = 0
        self.waited_seconds = 0.0
        self.exchange_seconds = 0.0
        self._exchange = exchange
        self._outer = outer
        self._pace = pace
        self._keep = keep
        self._pull = pull
        self._velocity = velocity
        self._share_buffers = share_buffers
        codec = exchange.codec if isinstance(exchange, CompressedExchange) else None
        parts = (outer.penalty, velocity, codec)
        self._form = " ".join(["2", str(keep), str(share_buffers), *(type(part).__name__ for part in parts)])
        self._clock = Clock()
        self._due = 0  # steps of the next round after which the mean is applied
        self._pending: Pending | None = None
        self._steps = 0  # since the round's start
        self._still = 0  # steps for which the velocity has not been added
        self._sent_steps = 0  # of the round that is under way
        self._samples = 0.0  # in this round
        self._weight = 0.0  # of this step
        self._lr = 1.0  # of this step
        self._asked = False
        self._stop = False
        self._loaded: Mapping[str, Any] | None = None
        self._before: Mapping[str, Any] = {"outer": None, "velocity": None, "point": None}  # that were loaded

    def start(self, module: nn.Module) -> None:
        """Begin a round at the first replica's parameters and buffers, or go on with the one that was loaded."""
        for value in persistent(module):
            self._await(self._exchange.transport.broadcast(value.data))
        parameters = [value for value in module.parameters() if value.requires_grad]
        buffers = floating_buffers(module)
        self._live = [value.data for value in parameters]
        self._buffers = BufferMean(buffers if self._share_buffers else [])
        self._own_buffers = [] if self._share_buffers else buffers
        self._size = sum(value.numel() for value in self._live)
        self._exact = self._buffers.size + NUMBERS
        # Parameters, buffers, numbers, and room for the weight.
        self._send = _flat([*self._live, *self._buffers.live], self._size + self._exact + 1)
        self._views = _views(self._send, self._live)
        self._gather()
        self._begun = self._send[: self._size].clone()
        point = self._before["point"]
        self._point = self._begun.clone() if point is None else point.to(self._begun, copy=True)
        self._outer.begin(self._point, self._before["outer"])
        if self._velocity:
            self._velocity.begin(self._point, parameters, self._before["velocity"])
        if self._loaded is not None:
            self._go_on(self._loaded)
        self._loaded, self._before = None, {}

    def begin(self, weight: float) -> float:
        """Return the weight itself: the gradient is that of this replica's own mean."""
        self._weight = weight
        return weight

    def before_backward(self) -> None:
        """Do nothing: gradients stay here."""

    def before_step(self, loss: float, stop: bool) -> Totals:
        """Return what this replica's own step came to, and whether a replica asked to stop, as far as all know."""
        self._asked = self._asked or stop
        return Totals(self._weight, loss, self._stop)

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        """Apply what is due, and send what a round came to."""
        began, waited = time.perf_counter(), self.waited_seconds
        self._lr = lr
        self._steps += 1
        self._still += 1
        self._samples += self._weight
        if self._still >= self._pace.stride:
            self._drift()
        if self._pending is not None:
            self._pending.advance()
            if self._steps >= self._due:
                self._apply(self._pending)
        if self._steps >= self._pace.every:
            pending = self._launch()
            if self._due == 0:
                self._apply(pending)
        self._clock.pack(time.perf_counter() - began - (self.waited_seconds - waited))

    @torch.no_grad()
    def finish(self) -> None:
        """Apply what is under way, and the plain mean of what was done since; afterwards the replicas are equal."""
        if self._steps:
            self._point.sub_(self._receive(self._launch()))
            self._buffers.unpack(self._mean_of_buffers)
        elif self._pending is not None:
            self._apply(self._pending)
        self._begun.copy_(self._point)
        self._put(self._point)
        self._buffers.load()
        if self._own_buffers:
            self._average(self._own_buffers)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Let the module hold the point that all replicas share inside the `with` block."""
        held = [*self._live, *self._buffers.live]
        aside = [value.clone() for value in held]
        self._put(self._point)
        self._buffers.load()
        try:
            yield
        finally:
            torch._foreach_copy_(held, aside)

    def figures(self) -> dict[str, float]:
        """Return the pace and what it was chosen from, if it is chosen."""
        return self._pace.figures()

    def state_dict(self) -> dict[str, Any]:
        """Return where this replica is, and what is under way, after waiting for it: it is not applied earlier."""
        mean = None
        if self._pending is not None:
            self._receive(self._pending)
            mean = self._send[: -NUMBERS - 1].clone()
            self._pending = Arrived(self._send)
        self._gather_into(here := torch.empty_like(self._begun))
        return {
            "form": self._form,
            "steps": self._steps,
            "still": self._still,
            "sent_steps": self._sent_steps,
            "samples": self._samples,
            "due": self._due,
            "every": self._pace.every,
            "delay": self._pace.delay,
            "here": here,
            "begun": self._begun,
            "mean": mean,
            "buffers": [value.clone() for value in [*self._buffers.live, *self._own_buffers]],
            "begun_buffers": [value.clone() for value in self._buffers.begun],
            "exchange": self._exchange.state_dict(),
            "shared": self._shared_state() if self._exchange.transport.rank == 0 else None,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None, first: Mapping[str, Any]) -> None:
        """Take where this replica was.

        Among more or fewer replicas, or where the run was kept together in another form, it begins a round at the
        shared point.
        """
        if first.get("form") == self._form:
            self._loaded, self._before = state, first["shared"]

    def _shared_state(self) -> dict[str, Any]:
        """Return what is equal on all replicas; the shared point only where the model is of narrower types."""
        velocity = self._velocity.state_dict() if self._velocity else None
        narrow = any(value.dtype != self._point.dtype for value in self._live)
        return {"outer": self._outer.state_dict(), "velocity": velocity, "point": self._point if narrow else None}

    def _go_on(self, state: Mapping[str, Any]) -> None:
        self._steps, self._samples, self._due = state["steps"], state["samples"], state["due"]
        self._still, self._sent_steps = state["still"], state["sent_steps"]
        self._pace.go_on(state["every"], state["delay"])
        self._begun.copy_(state["begun"])
        self._put(state["here"])
        self._exchange.load_state_dict(state["exchange"])
        buffers = [*self._buffers.live, *self._own_buffers, *self._buffers.begun]
        for value, saved in zip(buffers, [*state["buffers"], *state["begun_buffers"]], strict=True):
            value.copy_(saved)
        if state["mean"] is not None:
            self._send[: -NUMBERS - 1].copy_(state["mean"])
            self._pending = Arrived(self._send)

    def _launch(self) -> Pending:
        """Send how far this replica got in its round, and begin the next one; what is under way is applied before."""
        if self._pending is not None:
            self._apply(self._pending)
        self._drift()
        self._gather()
        here = self._send[: self._size]
        torch.sub(self._begun, here, out=here)
        if self._keep:
            self._gather_into(self._begun)
        else:
            self._begun.copy_(self._point)
            self._put(self._point)
        self._buffers.pack(self._mean_of_buffers)
        self._buffers.begin(keep=self._keep)
        numbers = [float(self._asked), *self._clock.lap(self._steps, self.waited_seconds)]
        self._send[-NUMBERS - 1 : -1] = torch.tensor(numbers, dtype=torch.float64)
        self._pending = pending = self._exchange.mean(self._send, self._samples, exact=self._exact)
        self._sent_steps = self._steps
        self._steps, self._samples, self._due = 0, 0.0, self._pace.delay
        return pending

    def _drift(self) -> None:
        """Add the velocity for the steps since this was done last."""
        if self._velocity and self._still:
            self._velocity.move(self._still)
        self._still = 0

    def _apply(self, pending: Pending) -> None:
        """Take the outer step, and go on from there with what was done since this was sent."""
        self._drift()
        mean = self._receive(pending)
        pull = self._pace.pull(self._due) if self._pull is None else self._pull
        if self._velocity:
            self._velocity.learn(mean, self._sent_steps)
        self._outer(mean, self._lr)
        here = mean  # which is used up
        self._gather()
        here.sub_(self._begun)
        self._begun.lerp_(self._point, pull)
        here.add_(self._begun)
        torch._foreach_copy_(self._live, self._views)
        self._buffers.unpack(self._mean_of_buffers)
        if self._keep or not self._steps:
            self._buffers.approach(pull)

    @property
    def _mean_of_buffers(self) -> Tensor:
        """The part of the message that is of buffers."""
        return self._send[self._size : self._size + self._buffers.size]

    def _receive(self, pending: Pending) -> Tensor:
        """Wait for the mean, and return that of the differences, shape (n,)."""
        self._await(pending)
        if pending.seconds:
            self._clock.exchange_seconds = pending.seconds
        self._pending = None
        asked, *measured = self._send[-NUMBERS - 1 : -1].tolist()
        self._stop = self._stop or asked > 0
        self._pace.learn(*measured)
        return self._send[: self._size]

    def _average(self, buffers: Sequence[Tensor]) -> None:
        """Give buffers the mean of the replicas', each of which counts as much."""
        mean = BufferMean(buffers)
        for value in mean.shared:
            self._await(self._exchange.transport.broadcast(value))
        message = _flat(buffers, mean.size + 1)
        mean.pack(message[:-1])
        self._await(ExactExchange(self._exchange.transport).mean(message, 1.0))
        mean.unpack(message[:-1])
        mean.load()

    def _gather(self) -> None:
        """Copy the parameters into the message."""
        torch._foreach_copy_(self._views, self._live)

    def _gather_into(self, flat: Tensor) -> None:
        torch._foreach_copy_(_views(flat, self._live), self._live)

    def _put(self, flat: Tensor) -> None:
        torch._foreach_copy_(self._live, _views(flat, self._live))

    def _await(self, pending: Pending) -> None:
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
