"""The methods of local updates by their names: which outer step, how late, and what becomes of what was done since."""

import logging

from raytrain.registry import resolve
from raytrain.sync.averaging import Exchange
from raytrain.sync.compression import CompressedExchange
from raytrain.sync.global_momentum import Velocity
from raytrain.sync.interval import Pace
from raytrain.sync.local_updates import LocalUpdates
from raytrain.sync.options import (
    COMPRESSIONS,
    PENALTIES,
    Co2Options,
    DelayedAveragingOptions,
    LocalOptions,
    NesterovOptions,
    OuterMomentumOptions,
)
from raytrain.sync.outer import OuterStep, stable_below

logger = logging.getLogger(__name__)


def local_sgd(exchange: Exchange, options: LocalOptions) -> LocalUpdates:
    """Return local SGD (Stich 2019): the replicas go on from their mean."""
    return _made(exchange, options, OuterStep(), Pace(options.every, 0))


def slowmo(exchange: Exchange, options: OuterMomentumOptions) -> LocalUpdates:
    """Return SlowMo (Wang et al. 2020): an outer step with momentum, which scales with the learning rate."""
    outer = OuterStep(rate=options.outer_lr, beta=options.outer_momentum, scaled=True)
    return _made(exchange, options, outer, Pace(options.every, 0))


def diloco(exchange: Exchange, options: NesterovOptions) -> LocalUpdates:
    """Return DiLoCo (Douillard et al. 2023): an outer step with Nesterov's momentum."""
    outer = OuterStep(rate=options.outer_lr, beta=options.outer_momentum, nesterov=True)
    return _made(exchange, options, outer, Pace(options.every, 0))


def cocod(exchange: Exchange, options: LocalOptions) -> LocalUpdates:
    """Return CoCoD-SGD (Shen et al. 2019): the mean comes a round late, on top of what was done since."""
    return _made(exchange, options, OuterStep(), Pace(options.every, options.every))


def delayed_averaging(exchange: Exchange, options: DelayedAveragingOptions) -> LocalUpdates:
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
    velocity = Velocity(options.global_momentum) if options.global_momentum else None
    return _made(exchange, options, OuterStep(), pace, pull=options.alpha, velocity=velocity)


def co2(exchange: Exchange, options: Co2Options) -> LocalUpdates:
    """Return CO2 (Sun et al. 2024): what a replica did in a round comes back a round later, with a penalty."""
    penalty = resolve(PENALTIES, options.penalty, "sync.penalty")()
    outer = OuterStep(rate=options.outer_lr, beta=options.outer_momentum, clip=options.clip, penalty=penalty)
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
) -> LocalUpdates:
    if options.compression is not None:
        exchange = CompressedExchange(
            exchange.transport, resolve(COMPRESSIONS, options.compression, "sync.compression")()
        )
    if exchange.transport.rank == 0:
        _warn(outer, keep=keep)
    shares = options.buffers == "mean"
    return LocalUpdates(exchange, outer, pace, keep=keep, pull=pull, velocity=velocity, share_buffers=shares)


def _warn(outer: OuterStep, *, keep: bool) -> None:
    """Say if the outer step is unstable where local steps reach their minimum within a round."""
    rate, limit = outer.rate / outer.penalty.least(outer), stable_below(outer, late=not keep)
    if rate >= limit:
        logger.warning(
            "sync.outer_lr%s = %.3g can diverge: with sync.outer_momentum = %.3g it is stable below %.3g / c, where "
            "c, from 0 to "
            "1, is how much of the way to the minimum local steps go in a round%s",
            "" if rate == outer.rate else " over the penalty",
            rate,
            outer.beta,
            limit,
            "" if keep else '; sync.penalty = "secant" measures c and keeps below',
        )
