"""Forecasts of a sweep by curve extrapolation: what was predicted of each trial, and how right it was."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Forecast:
    """A prediction of the score at a trial's end.

    Attributes:
        trial: its number.
        step: where it was made.
        score: the expected one.
        low, high: between which it lies with a probability of 90 %.
        chance: to end better than all others were by then.
        end: the score at the end; None: the trial did not come to it.
        stopped: whether the trial was stopped for its chance.
    """

    trial: int
    step: int
    score: float
    low: float
    high: float
    chance: float
    end: float | None = None
    stopped: bool = False

    @property
    def right(self) -> bool:
        """Whether the trial ended between the two scores."""
        return self.end is not None and self.low <= self.end <= self.high


def forecasts(decisions: Iterable[Mapping[str, Any]]) -> list[Forecast]:
    """Return, of each trial with any, the first forecast; of one that was stopped, the last.

    Args:
        decisions: rows of a lineage.

    >>> row = {"member": 3, "predicted": {"score": 0.5, "low": 0.4, "high": 0.6, "chance": 0.3}}
    >>> rows = [{**row, "action": "continue", "step": 20}, {"member": 3, "action": "end", "step": 80, "score": 0.45}]
    >>> [(each.step, each.end, each.right) for each in forecasts(rows)]
    [(20, 0.45, True)]
    """
    first: dict[int, Forecast] = {}
    ends: dict[int, float] = {}
    for row in decisions:
        if "predicted" in row:
            stopped = row["action"] == "stop"
            forecast = Forecast(row["member"], row["step"], **row["predicted"], stopped=stopped)
            first[forecast.trial] = forecast if stopped else first.get(forecast.trial, forecast)
        elif row["action"] == "end":
            ends[row["member"]] = row["score"]
    return [replace(forecast, end=ends.get(trial)) for trial, forecast in sorted(first.items())]


def forecast_summary(found: Sequence[Forecast]) -> str:
    """Return in words how many trials were stopped, and how right the forecasts of the others were."""
    stopped, ended = sum(each.stopped for each in found), [each for each in found if each.end is not None]
    right = sum(each.right for each in ended)
    return f"{stopped} trials stopped early; {right} of {len(ended)} others ended within their first 90 % interval"
