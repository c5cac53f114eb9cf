"""Learning-rate schedules: pure functions of how far a run is, so that a schedule has no state to save."""

import math
from collections.abc import Callable

from raytrain.extensions import ExtensionPoint

SCHEDULES: dict[str, str] = {
    "constant": "raytrain.optim.schedules:constant",
    "linear": "raytrain.optim.schedules:linear",
    "cosine": "raytrain.optim.schedules:cosine",
    "wsd": "raytrain.optim.schedules:wsd",
}

SCHEDULE = ExtensionPoint("schedule.name", "a function (done, decay) -> height of the learning rate", arguments=2)

ScheduleShape = Callable[[float, float], float]
"""(share of the steps after the warm-up that are done, share of them that decays) -> height from 1 down to 0."""


def constant(done: float, decay: float) -> float:  # noqa: ARG001 - every shape takes the same arguments
    """Stay at 1."""
    return 1.0


def linear(done: float, decay: float) -> float:  # noqa: ARG001
    """Fall from 1 to 0 along a line."""
    return 1.0 - done


def cosine(done: float, decay: float) -> float:  # noqa: ARG001
    """Fall from 1 to 0 along half a cosine (Loshchilov and Hutter 2017, SGDR, without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def wsd(done: float, decay: float) -> float:
    """Stay at 1, then fall to 0 along a line in the last `decay` of the steps (Hu et al. 2024, MiniCPM: WSD)."""
    return 1.0 if done <= 1.0 - decay else (1.0 - done) / decay


def lr_factor(
    shape: ScheduleShape, step: int, *, steps: int, warmup: int, min_lr_ratio: float, decay_ratio: float
) -> float:
    """Return the factor of the learning rate at step `step` of `steps`, counted from 0.

    The first `warmup` steps rise along a line to 1; after them the factor follows `shape`, scaled so that it ends at
    `floor`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return min_lr_ratio + (1.0 - min_lr_ratio) * shape(done, decay_ratio)
