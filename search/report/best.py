"""Panels of the best score so far: over time, and over steps beside what random search finds on average."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from raytrain.run.report.panel import Panel, Series, line_chart
from search.journal.rows import DecisionRow, ReportRow
from search.scheduling.segments import Objective

Scored = Sequence[tuple[ReportRow, float]]
"""Ends of segments, each with its score."""

ON_AVERAGE = (
    "Of a random search also the mean over all orders of its trials that did not fail. To see it beside another search "
    "of the same space and base recipe, report both: raytrain report RUN RANDOM."
)


def best_panels(
    objective: Objective, decisions: Sequence[DecisionRow], scored: Scored, section: Mapping[str, Any]
) -> list[Panel | None]:
    """Return the best score so far over seconds, and over the steps of all members.

    Args:
        objective: what is improved.
        decisions: the lineage.
        scored: in the order of time.
        section: `[search]` of the recipe.
    """
    better = min if objective.better == "lower" else max
    best = list(accumulate((score for _, score in scored), better))
    seconds = [report["seconds"] for report, _ in scored]
    steps = list(accumulate(report["step"] - decisions[report["row"]].get("step", 0) for report, _ in scored))
    over_time = line_chart("Best so far", {"best": (seconds, best)}, x="seconds", y=objective.metric)
    lines: dict[str, Series] = {"best": (steps, best)}
    draws = _draws(scored, section)
    if draws:
        each = steps[-1] / len(scored)
        expected = expected_best(draws, objective)
        lines["random draws, on average"] = ([each * (count + 1) for count in range(len(draws))], expected)
    logarithmic = objective.better == "lower" and bool(best) and min(best) > 0
    over_steps = line_chart(
        "Best so far by steps", lines, x="steps of all members", y=objective.metric, log_y=logarithmic, note=ON_AVERAGE
    )
    return [over_time, over_steps]


def expected_best(scores: Sequence[float], objective: Objective) -> list[float]:
    """Return the expected best of the first k scores, k = 1 to n, over all orders of the scores.

    With the scores sorted, the best first, the i-th of n is the best of k drawn ones with probability
    C(n - i, k - 1) / C(n, k), which is p_1 = k / n and p_(i+1) = p_i (n - i - k + 1) / (n - i).

    >>> expected_best([3.0, 1.0, 2.0], Objective("loss", "lower"))
    [2.0, 1.3333333333333333, 1.0]
    """
    ranked = np.array(sorted(scores, key=objective.fitness, reverse=True))
    count, places = len(ranked), np.arange(1, len(ranked))
    means = []
    for drawn in range(1, count + 1):
        ratios = (count - places - drawn + 1) / (count - places)
        chances = drawn / count * np.cumprod([1.0, *ratios])
        means.append(float(chances @ ranked))
    return means


def _draws(scored: Scored, section: Mapping[str, Any]) -> list[float]:
    """Return the scores of the independent draws of a random search; of other searches nothing."""
    first = section.get("first")
    guesses = len(first) if isinstance(first, list) else 0
    drawn = section.get("name") == "random"
    return [score for report, score in scored if drawn and report["member"] >= guesses and math.isfinite(score)]
