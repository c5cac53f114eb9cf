"""Local-update methods by name: outer optimizer, interval and delay, and what becomes of local progress."""

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
    """Return local SGD (Stich 2019): parameters are averaged at the end of a round."""
    return _build(averager, options, OuterOptimizer(), SyncInterval(options.every, 0))


def slowmo(averager: Averager, options: OuterMomentumOptions) -> LocalUpdates:
    """Return SlowMo (Wang et al. 2020): outer momentum that scales with the learning rate."""
    outer = OuterOptimizer(lr=options.outer_lr, momentum_factor=options.outer_momentum, lr_scaled=True)
    return _build(averager, options, outer, SyncInterval(options.every, 0))


def diloco(averager: Averager, options: NesterovOptions) -> LocalUpdates:
    """Return DiLoCo (Douillard et al. 2023): outer SGD with Nesterov momentum."""
    outer = OuterOptimizer(lr=options.outer_lr, momentum_factor=options.outer_momentum, nesterov=True)
    return _build(averager, options, outer, SyncInterval(options.every, 0))


def cocod(averager: Averager, options: LocalUpdateOptions) -> LocalUpdates:
    """Return CoCoD-SGD (Shen et al. 2019): averaging one round late, local progress kept."""
    return _build(averager, options, OuterOptimizer(), SyncInterval(options.every, options.every))


def delayed_averaging(averager: Averager, options: DelayedAveragingOptions) -> LocalUpdates:
    """Return local SGD with delayed averaging and global momentum.

    The mean of the replicas moves by their own steps and by global momentum, which is equal on all of them. Averaging
    changes only their distances from the mean, so a delay costs little: only these distances are stale.

    When the average arrives, a replica is interpolated toward it with weight alpha < 1 (after Overlap-Local-SGD, Wang
    et al. 2020), because the d local steps since it sent have covered part of the distance. Where a step leaves a share
    q of a distance, a round leaves (q^d - alpha) q^(tau - d) of it. With alpha = 1 - (d / tau)^2 / 2 that is at most a
    half, for any q; with alpha = 1 and a delay of a round it is -1 at q = 0, and distances never shrink.
    """
    interval = SyncInterval(options.every, options.delay)
    global_momentum = GlobalMomentum(options.global_momentum) if options.global_momentum else None
    return _build(averager, options, OuterOptimizer(), interval, alpha=options.alpha, global_momentum=global_momentum)


def co2(averager: Averager, options: Co2Options) -> LocalUpdates:
    """Return CO2 (Sun et al. 2024): outer momentum one round late, local progress discarded, with a penalty."""
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
    """Warn if the outer step is unstable where a round of local steps reaches the minimum."""
    rate, limit = outer.lr / outer.penalty.minimum(outer), max_stable_lr(outer, late=not keep_local_progress)
    if rate >= limit:
        logger.warning(
            "sync.outer_lr%s = %.3g can diverge: with sync.outer_momentum = %.3g it is stable below %.3g / c, where "
            "c, from 0 to 1, is how much of the way to the minimum local steps go in a round%s",
            "" if rate == outer.lr else " over the penalty",
            rate,
            outer.momentum_factor,
            limit,
            "" if keep_local_progress else '; sync.penalty = "secant" measures c and keeps below',
        )
