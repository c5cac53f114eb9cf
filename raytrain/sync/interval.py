"""How long a round is, and how late its mean is applied: as given, or found from what is measured."""

import math
import os
import time
from pathlib import Path
from typing import Literal

HIDING_MARGIN = 1.1
"""How much longer than the exchange took last time the steps that hide it are to take."""

MAX_OVERHEAD = 0.03
"""The largest share of a round's processor time that the exchange itself may take."""

INITIAL_STEPS = 4
"""Steps in a round before anything is measured."""

MIN_SLICES = 12
"""Parts of a round, at least, over which a movement is spread."""

MAX_STEPS = 4096
"""Steps in a round, at most: a link that is slower still is not hidden."""

StepsOrAuto = int | Literal["auto"]


class SyncInterval:
    """Steps in a round (tau), and from sending to applying (d).

    With C seconds for a step and T for an exchange, an exchange hides behind d = ceil(T / C) steps; a round is at least
    that long, and so long that the exchange's own processor time is a small part of it. Every replica measures, and all
    take the mean of what they measured, which they learn from the exchange itself: so all decide alike.

    Args:
        every: tau, or "auto": the smallest there can be.
        delay: d, at most tau, or "auto": the smallest there can be.
    """

    def __init__(self, every: StepsOrAuto, delay: StepsOrAuto) -> None:
        self._fixed = (every, delay)
        self._least = 0 if delay == "auto" else delay  # steps in a round
        self.every = max(INITIAL_STEPS, self._least) if every == "auto" else every
        self.delay = self.every if delay == "auto" else delay
        self._measured: dict[str, float] = {}

    @property
    def is_fixed(self) -> bool:
        """Whether nothing that is measured changes anything."""
        return "auto" not in self._fixed

    @property
    def momentum_stride(self) -> int:
        """For how many steps at a time to add what is spread over a round: each time costs an optimizer's step."""
        return max(1, self.every // MIN_SLICES)

    def alpha(self, delay: int) -> float:
        """Return how far to pull a replica so that of any distance at most a half is left after a round.

        Args:
            delay: steps from sending to applying, as it was when this was sent.
        """
        return 1.0 - min(delay / self.every, 1.0) ** 2 / 2

    def restore(self, every: int, delay: int) -> None:
        """Go on from where a run was, unless it is given."""
        if self._fixed[0] == "auto":
            self.every = max(every, self._least)
        self.delay = min(delay, self.every) if self._fixed[1] == "auto" else self.delay

    def update(self, step_seconds: float, exchange_seconds: float, cost_seconds: float) -> None:
        """Choose anew from the means over the replicas.

        Args:
            step_seconds: of a step, without waiting for others.
            exchange_seconds: from sending to the arrival of the mean; 0 if there was none yet.
            cost_seconds: processor time that a replica spent on an exchange, and on moving beside its own steps.
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
        """Return the choice and what it was made from, as the newest means over the replicas; {} if all is given."""
        return {"every": self.every, "delay": self.delay, **self._measured} if self._measured else {}


class RoundTimer:
    """Measures the rounds of one replica."""

    def __init__(self) -> None:
        self.exchange_seconds = 0.0  # of the last one
        self._began = time.perf_counter()
        self._waited = 0.0
        self._worked = _worked()
        self._packed = 0.0

    def add_overhead(self, seconds: float) -> None:
        """Count time of the loop as the exchange's."""
        self._packed += seconds

    def end_round(self, steps: int, waited: float) -> list[float]:
        """End a round of `steps` steps, and return what `SyncInterval.learn` takes.

        Args:
            steps: how many there were.
            waited: seconds that the loop has waited for others, in all rounds.
        """
        now, worked = time.perf_counter(), _worked()
        cost = worked - self._worked + self._packed
        step = max(now - self._began - (waited - self._waited) - self._packed, 0.0) / max(steps, 1)
        self._began, self._waited, self._worked, self._packed = now, waited, worked, 0.0
        return [step, self.exchange_seconds, cost]


def _worked() -> float:
    """Return the processor time of gloo's threads in this process, which work beside those that compute.

    Where the system does not tell, 0: then the cost of exchanges is what packing takes.
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
