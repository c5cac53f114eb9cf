"""The methods of local updates by their names: which outer step, how late, and what becomes of what was done since."""

import logging

from raytrain.registry import resolve
from raytrain.sync.averaging import Averager
from raytrain.sync.compression import CompressedAverager
from raytrain.sync.global_momentum import GlobalMomentum
from raytrain.sync.interval import SyncInterval
from raytrain.sync.local_updates import LocalUpdates
from raytrain.sync.options import (
    COMPRESSIONS,
    PENALTIES,
    Co2Options,
    DelayedAveragingOptions,
    LocalUpdateOptions,
    NesterovOptions,
    OuterMomentumOptions,
)
from raytrain.sync.outer import OuterOptimizer, max_stable_lr

logger = logging.getLogger(__name__)


def local_sgd(averager: Averager, options: LocalUpdateOptions) -> LocalUpdates:
    """Return local SGD (Stich 2019): the replicas go on from their mean."""
    return _build(averager, options, OuterOptimizer(), SyncInterval(options.every, 0))


def slowmo(averager: Averager, options: OuterMomentumOptions) -> LocalUpdates:
    """Return SlowMo (Wang et al. 2020): an outer step with momentum, which scales with the learning rate."""
    outer = OuterOptimizer(lr=options.outer_lr, momentum_factor=options.outer_momentum, lr_scaled=True)
    return _build(averager, options, outer, SyncInterval(options.every, 0))


def diloco(averager: Averager, options: NesterovOptions) -> LocalUpdates:
    """Return DiLoCo (Douillard et al. 2023): an outer step with Nesterov's momentum."""
    outer = OuterOptimizer(lr=options.outer_lr, momentum_factor=options.outer_momentum, nesterov=True)
    return _build(averager, options, outer, SyncInterval(options.every, 0))


def cocod(averager: Averager, options: LocalUpdateOptions) -> LocalUpdates:
    """Return CoCoD-SGD (Shen et al. 2019): the mean comes a round late, on top of what was done since."""
    return _build(averager, options, OuterOptimizer(), SyncInterval(options.every, options.every))


def delayed_averaging(averager: Averager, options: DelayedAveragingOptions) -> LocalUpdates:
    """Return local SGD whose mean comes some steps late, and whose momentum is spread over the local steps.

    The mean of the replicas moves by their own steps and by what `GlobalMomentum` adds, which is the same on all of them;
    averaging changes only how far they are from it. So lateness costs little: what comes late is how far they strayed.

    A replica is not pulled all the way to the shared point (after Overlap-Local-SGD, Wang et al. 2020): the d steps
    since it sent have undone part of the distance that it had then, and taking that out again would put it on the other
    side. Where a step leaves a share q of a distance, a round leaves (q^d - pull) q^(tau - d) of it. With
    pull = 1 - (d / tau)^2 / 2 that is at most a half, whatever q; with 1, a round late, it is -1 where q is 0, and
    distances never shrink.
    """
    interval = SyncInterval(options.every, options.delay)
    global_momentum = GlobalMomentum(options.global_momentum) if options.global_momentum else None
    return _build(averager, options, OuterOptimizer(), interval, alpha=options.alpha, global_momentum=global_momentum)


def co2(averager: Averager, options: Co2Options) -> LocalUpdates:
    """Return CO2 (Sun et al. 2024): what a replica did in a round comes back a round later, with a penalty."""
    penalty = resolve(PENALTIES, options.penalty, "sync.penalty")()
    outer = OuterOptimizer(
        lr=options.outer_lr, momentum_factor=options.outer_momentum, clip=options.clip, penalty=penalty
    )
    return _build(averager, options, outer, SyncInterval(options.every, options.every), keep_local_progress=False)


def _build(
    averager: Averager,
    options: LocalUpdateOptions,
    outer: OuterOptimizer,
    interval: SyncInterval,
    *,
    keep_local_progress: bool = True,
    alpha: float | None = 1.0,
    global_momentum: GlobalMomentum | None = None,
) -> LocalUpdates:
    if options.compression is not None:
        averager = CompressedAverager(
            averager.transport, resolve(COMPRESSIONS, options.compression, "sync.compression")()
        )
    if averager.transport.rank == 0:
        _warn_if_unstable(outer, keep_local_progress=keep_local_progress)
    shares = options.buffers == "mean"
    return LocalUpdates(
        averager,
        outer,
        interval,
        keep_local_progress=keep_local_progress,
        alpha=alpha,
        global_momentum=global_momentum,
        share_buffers=shares,
    )


def _warn_if_unstable(outer: OuterOptimizer, *, keep_local_progress: bool) -> None:
    """Say if the outer step is unstable where local steps reach their minimum within a round."""
    rate, limit = outer.lr / outer.penalty.minimum(outer), max_stable_lr(outer, late=not keep_local_progress)
    if rate >= limit:
        logger.warning(
            "sync.outer_lr%s = %.3g can diverge: with sync.outer_momentum = %.3g it is stable below %.3g / c, where "
            "c, from 0 to "
            "1, is how much of the way to the minimum local steps go in a round%s",
            "" if rate == outer.lr else " over the penalty",
            rate,
            outer.momentum_factor,
            limit,
            "" if keep_local_progress else '; sync.penalty = "secant" measures c and keeps below',
        )
