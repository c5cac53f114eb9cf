"""Learning-rate schedules: pure functions of the progress of a run, without state."""

import math
from collections.abc import Callable

from raytrain.extensions import ExtensionPoint

SCHEDULES: dict[str, str] = {
    "constant": "raytrain.optim.schedules:constant Constant learning rate.",
    "linear": "raytrain.optim.schedules:linear Linear decay.",
    "cosine": "raytrain.optim.schedules:cosine Cosine decay without restarts (Loshchilov and Hutter 2017).",
    "wsd": "raytrain.optim.schedules:wsd Constant, then linear decay for decay_ratio of the steps (Hu et al. 2024).",
}

SCHEDULE = ExtensionPoint("schedule.name", "a function (done, decay) -> height of the learning rate", arguments=2)

ScheduleShape = Callable[[float, float], float]
"""(fraction of the steps after warm-up that are done, fraction of them that decays) -> factor from 1 down to 0."""


def constant(done: float, decay: float) -> float:  # noqa: ARG001 - every shape takes the same arguments
    """Constant: 1."""
    return 1.0


def linear(done: float, decay: float) -> float:  # noqa: ARG001
    """Decay linearly from 1 to 0."""
    return 1.0 - done


def cosine(done: float, decay: float) -> float:  # noqa: ARG001
    """Decay from 1 to 0 along half a cosine (Loshchilov and Hutter 2017, SGDR, without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def wsd(done: float, decay: float) -> float:
    """Warmup-stable-decay: 1, then linear decay in the last `decay` of the steps (Hu et al. 2024)."""
    return 1.0 if done <= 1.0 - decay else (1.0 - done) / decay


def lr_factor(
    shape: ScheduleShape, step: int, *, steps: int, warmup: int, min_lr_ratio: float, decay_ratio: float
) -> float:
    """Return the learning-rate factor of a step.

    factor = (step + 1) / (warmup + 1)                                                 for step < warmup
    factor = min_lr_ratio + (1 - min_lr_ratio) * shape((step - warmup) / (steps - warmup), decay_ratio)   after it

    Args:
        shape: of the decay.
        step: counted from 0.
        steps: of the run.
        warmup: steps of the linear warm-up.
        min_lr_ratio: factor at the end.
        decay_ratio: fraction of the steps that decays, for shapes with a constant part.

    >>> [round(lr_factor(linear, step, steps=5, warmup=1, min_lr_ratio=0.2, decay_ratio=1.0), 3) for step in range(5)]
    [0.5, 1.0, 0.8, 0.6, 0.4]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return min_lr_ratio + (1.0 - min_lr_ratio) * shape(done, decay_ratio)
