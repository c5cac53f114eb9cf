"""Local updates: replicas step on their own, and now and then share what it came to."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from raytrain.names import resolve
from raytrain.sync.compressed import CODECS, CompressedExchange
from raytrain.sync.exchange import ExactExchange, Exchange
from raytrain.sync.outer import PENALTIES, OuterStep, stable_below
from raytrain.sync.pace import Clock, Pace
from raytrain.sync.rest import persistent
from raytrain.sync.synchroniser import SyncOptions, Totals
from raytrain.sync.transport import Arrived, Pending
from raytrain.sync.velocity import Velocity

NUMBERS = 4
"""What travels with the differences: a wish to stop, and what a step and an exchange take."""

logger = logging.getLogger(__name__)


class LocalOptions(SyncOptions):
    """Options of local SGD: every so many steps the replicas go on from their mean.

    Attributes:
        every: steps in a round.
        codec: how differences are sent: "bfloat16", "int8", or as they are; what rounding leaves out is sent later.
        buffers: "mean": buffers such as the running means of BatchNorm are averaged as parameters are; "local": each
            worker keeps its own, and they are averaged at the end.
    """

    name: str = "local-sgd"
    every: int = Field(12, ge=1)
    codec: str | None = None
    buffers: Literal["mean", "local"] = "mean"

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, name: str | None) -> str | None:
        if name is not None:
            resolve(CODECS, name, "sync.codec")
        return name


class MomentumOptions(LocalOptions):
    """Options of an outer step with momentum.

    Attributes:
        rate: of the outer step.
        momentum: of the outer step.
    """

    rate: float = Field(1.0, gt=0)
    momentum: float = Field(0.5, ge=0, lt=1)


class NesterovOptions(MomentumOptions):
    """Options of an outer step with Nesterov's momentum; the defaults are those of DiLoCo."""

    rate: float = Field(0.7, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)


class LateOptions(LocalOptions):
    """Options of the mean that comes late, on top of what was done since.

    Attributes:
        every: steps in a round; "auto": as few as hide the exchange, and keep its processor time below 3 % of theirs.
        delay: steps from sending to applying, at most `every`; "auto": as few as hide the exchange.
        momentum: of the mean of the workers' last steps, the share that each of them adds to its own, in at least
            twelve parts of a round; a movement that lasts is amplified by up to 1 / (1 - momentum). It takes less where
            the optimizer's own momentum is above 0.9.
        pull: how far a replica comes from where it was when it sent to the shared point; default: 1, all the way, at
            once, down to 1/2 a round late.
    """

    every: Annotated[int, Field(ge=1)] | Literal["auto"] = 12  # type: ignore[assignment]
    delay: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    momentum: float = Field(0.7, ge=0, lt=1)
    pull: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.every != "auto" and self.delay != "auto" and self.delay > self.every:
            raise ValueError(f"expected sync.delay of at most sync.every = {self.every}; got {self.delay}")
        return self


class Co2Options(MomentumOptions):
    """Options of CO2 as published.

    Attributes:
        penalty: what a difference is divided by, because it is late: "none", "constant", "gap-aware" or "secant".
        clip: the largest element of the momentum; 0: any.
    """

    momentum: float = Field(0.2, ge=0, lt=1)
    penalty: str = "secant"
    clip: float = Field(1.0, ge=0)

    @field_validator("penalty")
    @classmethod
    def _known_penalty(cls, name: str) -> str:
        resolve(PENALTIES, name, "sync.penalty")
        return name


def local_sgd(exchange: Exchange, options: LocalOptions) -> "LocalUpdates":
    """Return local SGD (Stich 2019): the replicas go on from their mean."""
    return _made(exchange, options, OuterStep(), Pace(options.every, 0))


def slowmo(exchange: Exchange, options: MomentumOptions) -> "LocalUpdates":
    """Return SlowMo (Wang et al. 2020): an outer step with momentum, of differences that are not divided by a rate."""
    return _made(exchange, options, OuterStep(rate=options.rate, beta=options.momentum), Pace(options.every, 0))


def diloco(exchange: Exchange, options: NesterovOptions) -> "LocalUpdates":
    """Return DiLoCo (Douillard et al. 2023): an outer step with Nesterov's momentum."""
    outer = OuterStep(rate=options.rate, beta=options.momentum, nesterov=True)
    return _made(exchange, options, outer, Pace(options.every, 0))


def cocod(exchange: Exchange, options: LocalOptions) -> "LocalUpdates":
    """Return CoCoD-SGD (Shen et al. 2019): the mean comes a round late, on top of what was done since."""
    return _made(exchange, options, OuterStep(), Pace(options.every, options.every))


def late(exchange: Exchange, options: LateOptions) -> "LocalUpdates":
    """Return local SGD whose mean comes some steps late, and whose momentum is spread over the local steps.

    The mean of the replicas moves by their own steps and by what `Velocity` adds, which is the same on all of them;
    averaging changes only how far they are from it. So lateness costs little: what comes late is how far they strayed.

    A replica is not pulled all the way to the shared point (after Overlap-Local-SGD, Wang et al. 2020): the d steps
    since it sent have undone part of the distance that it had then, and taking that out again would put it on the other
    side. Where a step leaves a share q of a distance, a round leaves (q^d - pull) q^(tau - d) of it. With
    pull = 1 - (d / tau)^2 / 2 that is at most a half, whatever q; with 1, a round late, it is -1 where q is 0, and
    distances never shrink.
    """
    pace = Pace(options.every, options.delay)
    velocity = Velocity(options.momentum) if options.momentum else None
    return _made(exchange, options, OuterStep(), pace, pull=options.pull, velocity=velocity)


def co2(exchange: Exchange, options: Co2Options) -> "LocalUpdates":
    """Return CO2 (Sun et al. 2024): what a replica did in a round comes back a round later, with a penalty."""
    penalty = resolve(PENALTIES, options.penalty, "sync.penalty")()
    outer = OuterStep(rate=options.rate, beta=options.momentum, clip=options.clip, penalty=penalty)
    return _made(exchange, options, outer, Pace(options.every, options.every), keep=False)


def _made(
    exchange: Exchange,
    options: LocalOptions,
    outer: OuterStep,
    pace: Pace,
    *,
    keep: bool = True,
    pull: float | None = 1.0,
    velocity: Velocity | None = None,
) -> "LocalUpdates":
    if options.codec is not None:
        exchange = CompressedExchange(exchange.transport, resolve(CODECS, options.codec, "sync.codec")())
    if exchange.transport.rank == 0:
        _warn(outer, keep=keep)
    shares = options.buffers == "mean"
    return LocalUpdates(exchange, outer, pace, keep=keep, pull=pull, velocity=velocity, share_buffers=shares)


def _warn(outer: OuterStep, *, keep: bool) -> None:
    """Say if the outer step is unstable where local steps reach their minimum within a round."""
    rate, limit = outer.rate / outer.penalty.least(outer), stable_below(outer, late=not keep)
    if rate >= limit:
        logger.warning(
            "sync.rate%s = %.3g can diverge: with sync.momentum = %.3g it is stable below %.3g / c, where c, from 0 to "
            "1, is how much of the way to the minimum local steps go in a round%s",
            "" if rate == outer.rate else " over the penalty",
            rate,
            outer.beta,
            limit,
            "" if keep else '; sync.penalty = "secant" measures c and keeps below',
        )


class LocalUpdates:
    """Exchange how far each replica got every so many steps, and apply the mean some steps later.

    At a round's end a replica sends the difference between where its round began and where it is, notes where that is,
    and goes on. When the mean is due, the shared point X takes an outer step, and the replica moves by pull * (X -
    where it was when it sent): its movement meanwhile is kept, and becomes part of its next difference. With delay 0
    and pull 1 that is DiLoCo, SlowMo or local SGD, by the outer step; with a delay of a whole round and no momentum
    CoCoD-SGD (Shen et al. 2019). Without `keep` a replica goes on from X when it has sent, and what it did comes back
    with the mean only: a round late, that is CO2 (Sun et al. 2024).

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
        self._form = " ".join([str(keep), str(share_buffers), *(type(part).__name__ for part in parts)])
        self._clock = Clock()
        self._due = 0  # steps of the next round after which the mean is applied
        self._pending: Pending | None = None
        self._steps = 0  # since the round's start
        self._still = 0  # steps for which the velocity has not been added
        self._sent_steps = 0  # of the round that is under way
        self._samples = 0.0  # in this round
        self._weight = 0.0  # of this step
        self._asked = False
        self._stop = False
        self._loaded: Mapping[str, Any] | None = None
        self._before: Mapping[str, Any] = {"outer": None, "velocity": None}  # that were loaded

    def start(self, module: nn.Module) -> None:
        """Begin a round at the first replica's parameters and buffers, or go on with the one that was loaded."""
        parameters = [value for value in module.parameters() if value.requires_grad]
        tensors = [*persistent(module)]
        buffers = [value for value in tensors if not isinstance(value, nn.Parameter) and value.is_floating_point()]
        self._live = [value.data for value in [*parameters, *(buffers if self._share_buffers else [])]]
        self._own_buffers = [] if self._share_buffers else buffers
        self._stepped = sum(value.numel() for value in parameters)
        for value in tensors:
            self._await(self._exchange.transport.broadcast(value.data))
        size = sum(value.numel() for value in self._live)
        self._send = _flat(self._live, size + NUMBERS + 1)  # the last is room for the weight
        self._views = _views(self._send, self._live)
        self._gather()
        self._begun = self._send[:size].clone()
        point = self._begun.clone()
        self._outer.begin(point[: self._stepped], self._before["outer"])
        if self._velocity:
            self._velocity.begin(point[: self._stepped], parameters, self._before["velocity"])
        self._point = point
        if self._loaded is not None:
            self._go_on(self._loaded)

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
    def after_step(self) -> None:
        """Apply what is due, and send what a round came to."""
        began, waited = time.perf_counter(), self.waited_seconds
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
        if self._pending is not None:
            self._apply(self._pending)
        if self._steps:
            mean = self._receive(self._launch())
            self._point.sub_(mean)
            self._begun.copy_(self._point)
            self._put(self._point)
        if self._own_buffers:
            message = _flat(self._own_buffers, sum(value.numel() for value in self._own_buffers) + 1)
            torch._foreach_copy_(views := _views(message, self._own_buffers), self._own_buffers)
            self._await(ExactExchange(self._exchange.transport).mean(message, 1.0))
            torch._foreach_copy_(self._own_buffers, views)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Let the module hold the point that all replicas share inside the `with` block."""
        aside = [value.clone() for value in self._live]
        self._put(self._point)
        try:
            yield
        finally:
            torch._foreach_copy_(self._live, aside)

    def figures(self) -> dict[str, float]:
        """Return the pace and what it was chosen from, if it is chosen."""
        return self._pace.figures()

    def state_dict(self) -> dict[str, Any]:
        """Return where this replica is, and what is under way, after waiting for it: it is not applied earlier."""
        size = self._begun.numel()
        mean = None
        if self._pending is not None:
            mean = self._receive(self._pending).clone()
            self._pending = Arrived(self._send)
        self._gather_into(here := self._begun.new_empty(size))
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
            "buffers": [value.clone() for value in self._own_buffers],
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
        """Return what is equal on all replicas, beside the shared point."""
        velocity = self._velocity.state_dict() if self._velocity else None
        return {"outer": self._outer.state_dict(), "velocity": velocity}

    def _go_on(self, state: Mapping[str, Any]) -> None:
        self._steps, self._samples, self._due = state["steps"], state["samples"], state["due"]
        self._still, self._sent_steps = state["still"], state["sent_steps"]
        self._pace.go_on(state["every"], state["delay"])
        self._begun.copy_(state["begun"])
        self._put(state["here"])
        self._exchange.load_state_dict(state["exchange"])
        if self._own_buffers:
            torch._foreach_copy_(self._own_buffers, state["buffers"])
        if state["mean"] is not None:
            self._send[: self._begun.numel()].copy_(state["mean"])
            self._pending = Arrived(self._send)

    def _launch(self) -> Pending:
        """Send how far this replica got in its round, and begin the next one."""
        self._drift()
        size = self._begun.numel()
        self._gather()
        here = self._send[:size]
        torch.sub(self._begun, here, out=here)
        if self._keep:
            self._gather_into(self._begun)
        else:
            self._begun.copy_(self._point)
            self._put(self._point)
        numbers = [float(self._asked), *self._clock.lap(self._steps, self.waited_seconds)]
        self._send[size:-1] = torch.tensor(numbers, dtype=torch.float64)
        self._pending = pending = self._exchange.mean(self._send, self._samples, exact=NUMBERS)
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
        if self._velocity:
            self._velocity.learn(mean[: self._stepped], self._sent_steps)
        self._outer(mean[: self._stepped])
        self._point[self._stepped :].sub_(mean[self._stepped :])
        here = mean  # which is used up
        self._gather()
        here.sub_(self._begun)
        self._begun.lerp_(self._point, self._pace.pull(self._due) if self._pull is None else self._pull)
        here.add_(self._begun)
        torch._foreach_copy_(self._live, self._views)

    def _receive(self, pending: Pending) -> Tensor:
        """Wait for the mean, shape (n,)."""
        self._await(pending)
        if pending.seconds:
            self._clock.exchange_seconds = pending.seconds
        self._pending = None
        size = self._begun.numel()
        asked, *measured = self._send[size:-1].tolist()
        self._stop = self._stop or asked > 0
        self._pace.learn(*measured)
        return self._send[:size]

    def _gather(self) -> None:
        """Copy the parameters and buffers into the message."""
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
