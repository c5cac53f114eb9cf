"""How long a round is, and how late its mean is applied: as given, or found from what is measured."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

SLACK = 1.1
"""How much longer than the exchange took last time the steps that hide it are to take."""

SHARE = 0.03
"""The largest share of a round's processor time that the exchange itself may take."""

FIRST = 4
"""Steps in a round before anything is measured."""

LONGEST = 4096
"""Steps in a round, at most: a link that is slower still is not hidden."""

Steps = int | Literal["auto"]


class Pace:
    """Steps in a round (tau), and from sending to applying (d).

    With C seconds for a step and T for an exchange, an exchange hides behind d = ceil(T / C) steps; a round is at least
    that long, and so long that the exchange's own processor time is a small part of it. Every replica measures, and all
    take the mean of what they measured, which they learn from the exchange itself: so all decide alike.

    Args:
        every: tau, or "auto": the smallest there can be.
        delay: d, at most tau, or "auto": the smallest there can be.
    """

    def __init__(self, every: Steps, delay: Steps) -> None:
        self._fixed = (every, delay)
        self.every = FIRST if every == "auto" else every
        self.delay = self.every if delay == "auto" else delay

    @property
    def is_fixed(self) -> bool:
        """Whether nothing that is measured changes anything."""
        return "auto" not in self._fixed

    def learn(self, step_seconds: float, exchange_seconds: float, cost_seconds: float) -> None:
        """Choose anew from the means over the replicas.

        Args:
            step_seconds: of a step, without waiting for others.
            exchange_seconds: from sending to the arrival of the mean; 0 if there was none yet.
            cost_seconds: processor time that a replica spent on an exchange.
        """
        if self.is_fixed or not step_seconds or not exchange_seconds:
            return
        every, delay = self._fixed
        hidden = max(1, math.ceil(SLACK * exchange_seconds / step_seconds))
        if every == "auto":
            least = max(hidden, math.ceil(cost_seconds / (SHARE * step_seconds)))
            self.every = min(LONGEST, least if delay == "auto" else max(least, delay))
        self.delay = min(self.every, hidden) if delay == "auto" else delay


class Meter:
    """The processor time of the threads that send and receive, which work beside those that compute."""

    def __init__(self, names: Sequence[str] = ("gloo",)) -> None:
        self._names = names
        self._ticks = os.sysconf("SC_CLK_TCK")

    def seconds(self) -> float:
        """Return how long these threads of this process have worked; 0 where the system does not tell."""
        total = 0
        for task in Path("/proc/self/task").glob("*"):
            try:
                if any(name in (task / "comm").read_text() for name in self._names):
                    fields = (task / "stat").read_text().rpartition(")")[2].split()
                    total += int(fields[11]) + int(fields[12])
            except OSError:
                continue  # it has ended meanwhile
        return total / self._ticks
