"""Panels of a report page: a chart, a table, or both, as plain data. Kinds of runs make them; the page draws them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raytrain.json_files import is_number

MAX_POINTS = 2_000
"""Points of a line; longer series are averaged over bins."""
RUN_COLORS = 7
"""Colours of the palette that tell runs apart; the last one, "c7", is grey."""
FEW_POINTS = 20
"""Points of a line that are marked; of more, the line alone is shown."""
MAX_ROWS = 500
"""Rows of a table."""

Series = tuple[Sequence[float], Sequence[float | None]]
"""Horizontal and vertical coordinates of a line, of one length; None leaves a gap."""


def series(rows: Iterable[Mapping[str, Any]], field: str, x: str = "step") -> Series:
    """Return a field of rows over another one; rows that have no numbers there are left out, and None is a gap.

    >>> series([{"step": 1, "loss": 0.5}, {"step": 2, "loss": "?"}, {"step": 3, "loss": None}], "loss")
    ([1, 3], [0.5, None])
    """
    found = [
        (row[x], row[field])
        for row in rows
        if is_number(row.get(x)) and field in row and (row[field] is None or is_number(row[field]))
    ]
    return [place for place, _ in found], [value for _, value in found]


@dataclass(frozen=True, slots=True)
class Panel:
    """One part of a report page.

    Attributes:
        title: unique in a page; when runs are compared, panels of one title become one.
        traces: as Plotly takes them. A colour "c0", "c1", ... is one of the page's palette, light or dark.
        layout: of the chart, as Plotly takes it.
        columns, rows: of the table.
        note: a sentence below the title.
        comparable: whether the charts of several runs can be drawn into one.
    """

    title: str
    traces: Sequence[Mapping[str, Any]] = ()
    layout: Mapping[str, Any] = field(default_factory=dict)
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    note: str = ""
    comparable: bool = True


def line_chart(
    title: str, lines: Mapping[str, Series], *, x: str, y: str, log_y: bool = False, note: str = ""
) -> Panel | None:
    """Return a chart of lines by name, or None without a single point.

    Args:
        title: of the panel.
        lines: name -> coordinates.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis, with its unit.
        log_y: whether the vertical axis is logarithmic; values that are not positive are then left out.
        note: a sentence below the title.

    >>> line_chart("Loss", {"train": ([1, 2], [0.5, 0.25])}, x="step", y="loss").traces[0]["y"]
    [0.5, 0.25]
    """
    shown = {name: _binned(*_drawable(*line, log=log_y)) for name, line in lines.items()}
    traces = [
        {"type": "scatter", "mode": _mode(len(xs)), "name": name, "x": xs, "y": ys}
        for name, (xs, ys) in shown.items()
        if xs
    ]
    if not traces:
        return None
    scale = {"type": "log", "exponentformat": "power"} if log_y else {"type": "linear"}
    layout = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}, **scale}}
    return Panel(title, traces, layout, note=note)


def _mode(points: int) -> str:
    return "lines" if points > FEW_POINTS else "lines+markers"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> Panel | None:
    """Return a table, or None without a row; of a long one the last rows."""
    left_out = len(rows) - MAX_ROWS
    more = f"The last {MAX_ROWS} of {len(rows)} rows." if left_out > 0 else ""
    return (
        Panel(title, columns=columns, rows=rows[-MAX_ROWS:], note=" ".join(filter(None, [note, more])))
        if rows
        else None
    )


def compared(reports: Mapping[str, Sequence[Panel]]) -> list[Panel]:
    """Return the panels of several runs as one list: panels of one title share a chart, and a table with a run column.

    Args:
        reports: name of a run -> its panels.
    """
    every = [panel for panels in reports.values() for panel in panels]
    titles = dict.fromkeys(panel.title for panel in sorted(every, key=lambda panel: not panel.traces))  # charts first
    return [
        _joined([(run, panel) for run, panels in reports.items() for panel in panels if panel.title == title])
        for title in titles
    ]


def _joined(panels: Sequence[tuple[str, Panel]]) -> Panel:
    first = panels[0][1]
    traces = [
        {**_recolored(trace, place), "name": _name(run, trace)}
        for place, (run, panel) in enumerate(panels)
        for trace in panel.traces
        if panel.comparable
    ]
    columns = list(dict.fromkeys(column for _, panel in panels for column in panel.columns))
    rows = [
        [run, *(dict(zip(panel.columns, row, strict=True)).get(column, "") for column in columns)]
        for run, panel in panels
        for row in panel.rows
    ]
    return replace(first, traces=traces, columns=["run", *columns] if columns else [], rows=rows)


def _recolored(value: Any, shift: int) -> Any:
    """Return a trace with other colours of the palette, so that those of several runs differ."""
    if isinstance(value, Mapping):
        return {key: _recolored(part, shift) for key, part in value.items()}
    number = value[1:] if isinstance(value, str) and value[:1] == "c" else ""
    return f"c{(int(number) + shift) % RUN_COLORS}" if number.isdecimal() and int(number) < RUN_COLORS else value


def _name(run: str, trace: Mapping[str, Any]) -> str:
    return f"{run} · {trace['name']}" if trace.get("name") else run


def _drawable(xs: Sequence[float], ys: Sequence[float | None], *, log: bool) -> tuple[list[float], list[float | None]]:
    """Return the points that the axes have room for; a gap stays a gap."""
    points = [(x, y if y is not None and math.isfinite(y) else None) for x, y in zip(xs, ys, strict=True)]
    kept = [(x, y) for x, y in points if y is None or y > 0 or not log]
    return ([x for x, _ in kept], [y for _, y in kept]) if any(y is not None for _, y in kept) else ([], [])


def _binned(xs: list[float], ys: list[float | None]) -> tuple[list[float], list[float | None]]:
    """Average consecutive points where there are too many to draw."""
    size = -(-len(xs) // MAX_POINTS)
    if size <= 1:
        return xs, ys
    bins = range(0, len(xs), size)
    return [xs[start : start + size][-1] for start in bins], [_mean(ys[start : start + size]) for start in bins]


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
