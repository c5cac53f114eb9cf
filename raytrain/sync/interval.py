"""Synchronisation interval and delay: fixed, or adapted to measured step and all-reduce times."""

import math
import os
import time
from pathlib import Path
from typing import Literal

HIDING_MARGIN = 1.1
"""Time of the steps that hide an all-reduce, over the time that the last one took."""

MAX_OVERHEAD = 0.03
"""Upper bound on the all-reduce's share of a round's processor time."""

INITIAL_STEPS = 4
"""Steps in a round before the first measurement."""

MIN_SLICES = 12
"""Lower bound on the slices of a round in which global momentum is applied."""

MAX_STEPS = 4096
"""Upper bound on the steps in a round: a slower link is not hidden."""

StepsOrAuto = int | Literal["auto"]


class SyncInterval:
    """Local steps in a round (tau), and delay from sending to applying (d).

    An all-reduce of T seconds hides behind d = ceil(T / C) steps of C seconds. A round has at least d steps, and so
    many that the processor time of the all-reduce is at most `MAX_OVERHEAD` of it. Replicas average their measurements
    in the all-reduce itself, so all choose the same values.

    Args:
        every: tau, or "auto": as small as possible.
        delay: d, at most tau, or "auto": as small as possible.
    """

    def __init__(self, every: StepsOrAuto, delay: StepsOrAuto) -> None:
        self._fixed = (every, delay)
        self._least = 0 if delay == "auto" else delay  # steps in a round
        self.every = max(INITIAL_STEPS, self._least) if every == "auto" else every
        self.delay = self.every if delay == "auto" else delay
        self._measured: dict[str, float] = {}

    @property
    def is_fixed(self) -> bool:
        """Whether both are given, so that measurements change nothing."""
        return "auto" not in self._fixed

    @property
    def momentum_stride(self) -> int:
        """Steps between applications of global momentum, each of which costs as much as an optimizer step."""
        return max(1, self.every // MIN_SLICES)

    def alpha(self, delay: int) -> float:
        """Return the interpolation weight 1 - (delay / every)^2 / 2, with which distances at least halve in a round.

        Args:
            delay: at the time of sending.
        """
        return 1.0 - min(delay / self.every, 1.0) ** 2 / 2

    def restore(self, every: int, delay: int) -> None:
        """Restore the values of an interrupted run, unless they are given."""
        if self._fixed[0] == "auto":
            self.every = max(every, self._least)
        self.delay = min(delay, self.every) if self._fixed[1] == "auto" else self.delay

    def update(self, step_seconds: float, exchange_seconds: float, cost_seconds: float) -> None:
        """Adapt to means over the replicas.

        Args:
            step_seconds: of a step, without waiting for others.
            exchange_seconds: of an all-reduce; 0 if there was none yet.
            cost_seconds: processor time of a replica for an all-reduce and for global momentum.
        """
        if self.is_fixed or not step_seconds or not exchange_seconds:
            return
        self._measured = {
            "step_seconds": step_seconds,
            "exchange_seconds": exchange_seconds,
            "exchange_cost_seconds": cost_seconds,
        }
        every, delay = self._fixed
        hidden = max(1, math.ceil(HIDING_MARGIN * exchange_seconds / step_seconds))
        if every == "auto":
            cheap = math.ceil(cost_seconds / (MAX_OVERHEAD * step_seconds))
            self.every = max(self._least, min(MAX_STEPS, max(hidden, cheap)))
        self.delay = min(self.every, hidden) if delay == "auto" else delay

    def metrics(self) -> dict[str, float]:
        """Return interval, delay and the newest measurements; {} if nothing was measured."""
        return {"every": self.every, "delay": self.delay, **self._measured} if self._measured else {}


class RoundTimer:
    """Measures the rounds of a replica."""

    def __init__(self) -> None:
        self.exchange_seconds = 0.0  # of the last one
        self._began = time.perf_counter()
        self._waited = 0.0
        self._worked = _worked()
        self._packed = 0.0

    def add_overhead(self, seconds: float) -> None:
        """Count seconds of the loop as overhead of synchronisation."""
        self._packed += seconds

    def end_round(self, steps: int, waited: float) -> list[float]:
        """End a round, and return the arguments of `SyncInterval.update`.

        Args:
            steps: in this round.
            waited: seconds blocked in collectives, in all rounds.
        """
        now, worked = time.perf_counter(), _worked()
        cost = worked - self._worked + self._packed
        step = max(now - self._began - (waited - self._waited) - self._packed, 0.0) / max(steps, 1)
        self._began, self._waited, self._worked, self._packed = now, waited, worked, 0.0
        return [step, self.exchange_seconds, cost]


def _worked() -> float:
    """Return the processor time of gloo's threads in this process, in seconds.

    It is 0 where the system does not tell; then the cost of an all-reduce is that of packing.
    """
    ticks = 0
    for task in Path("/proc/self/task").glob("*"):
        try:
            if "gloo" in (task / "comm").read_text():
                fields = (task / "stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        except OSError:
            continue  # it has ended meanwhile
    return ticks / os.sysconf("SC_CLK_TCK")
