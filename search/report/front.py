"""Panels of the Pareto front."""

from collections.abc import Mapping, Sequence
from typing import Any

from raytrain.run.report.panel import Panel, table
from search.report.values import listed, wide_axis
from search.scheduling.segments import Objective
from search.standings import Standings


def front_panels(objectives: Sequence[Objective], standings: Standings, unit: str) -> list[Panel | None]:
    """Return a chart of the metric and each other objective: all that were trained, and the Pareto front of all.

    Args:
        objectives: the metric first.
        standings: of all.
        unit: "member" or "trial".
    """
    points = standings.points(objectives)
    if len(objectives) < 2 or not points:
        return []
    front = standings.front(objectives)
    charts = [_front_chart(objectives, place, points, front, unit) for place in range(1, len(objectives))]
    return [*charts, _front_table(objectives, standings, front, unit)]


def _front_chart(
    objectives: Sequence[Objective],
    place: int,
    points: Mapping[int, Sequence[float]],
    front: Mapping[int, Any],
    unit: str,
) -> Panel:
    first, other = objectives[0].metric, objectives[place].metric
    line = len(objectives) == 2
    traces = []
    for title, color, wanted in (("others", "c7", False), ("Pareto front", "c1", True)):
        chosen = sorted((row[place], row[0], number) for number, row in points.items() if (number in front) is wanted)
        trace = {"type": "scatter", "mode": "lines+markers" if wanted and line else "markers", "name": title}
        words = [f"{unit} {number}" for *_, number in chosen]
        xs, ys = [x for x, *_ in chosen], [y for _, y, _ in chosen]
        traces.append({**trace, "x": xs, "y": ys, "text": words, "line": {"shape": "hv"}, "marker": {"color": color}})
    layout = {"xaxis": wide_axis(other, [row[place] for row in points.values()])}
    layout["yaxis"] = wide_axis(first, [row[0] for row in points.values()])
    better = " and ".join(f"{each.better} {each.metric}" for each in (objectives[0], objectives[place]))
    return Panel(f"Pareto front: {first} and {other}", traces, layout, note=f"Better: {better}.")


def _front_table(
    objectives: Sequence[Objective], standings: Standings, front: Mapping[int, Sequence[float]], unit: str
) -> Panel | None:
    shown = {number: [int(value) if value.is_integer() else value for value in row] for number, row in front.items()}
    rows = [[number, *values, listed(standings.members[number].values)] for number, values in shown.items()]
    note = f"No other {unit} is at least as good in all of these and better in one."
    return table("Pareto front", [unit, *(each.metric for each in objectives), "hyperparameters"], rows, note=note)
