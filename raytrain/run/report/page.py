"""Report page: one self-contained HTML file, which opens without a network, in light and dark, also on a phone."""

import base64
import gzip
import html
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from raytrain.json_files import is_number, to_json
from raytrain.run.report.panel import Panel


def render(title: str, about: str, figures: Mapping[str, Any], panels: Sequence[Panel], footer: str = "") -> str:
    """Return the page as HTML.

    Every string is shown as it is: markup in it is escaped.

    Args:
        title: of the page.
        about: a line below the title.
        figures: label -> value, shown first.
        panels: in the order to show them.
        footer: a line at the end.
    """
    parts = {
        "title": html.escape(title),
        "about": html.escape(about),
        "style": _asset("page.css"),
        "figures": "\n".join(_figure(label, value) for label, value in figures.items()),
        "panels": "\n".join(_section(place, panel) for place, panel in enumerate(panels)),
        "footer": html.escape(footer),
        "data": _data(panels),
        "plotly": _plotly() if any(panel.traces for panel in panels) else "",
        "script": _asset("page.js"),
    }
    return re.sub("@([a-z]+)@", lambda place: parts[place[1]], _asset("page.html"))


def _figure(label: str, value: Any) -> str:
    return f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(number(value))}</dd></div>"


def _section(place: int, panel: Panel) -> str:
    note = f'<p class="note">{html.escape(panel.note)}</p>' if panel.note else ""
    label = html.escape(panel.title, quote=True)
    chart = f'<div class="chart" id="chart-{place}" role="img" aria-label="{label}"></div>' if panel.traces else ""
    wide = "" if panel.traces and not panel.rows else ' class="wide"'
    body = _table(panel.columns, panel.rows) if panel.rows else _values(panel)
    return f"<section{wide}><h2>{html.escape(panel.title)}</h2>{note}{chart}{body}</section>"


def _values(panel: Panel) -> str:
    """Return the range of each line as a folded table, for readers without a pointer or without the picture."""
    bars = [trace for trace in panel.traces if trace.get("type") == "bar"]
    if bars:
        pairs = [pair for trace in bars for pair in zip(trace["y"], trace["x"], strict=True)]
        return _folded(["", "value"], pairs[::-1])
    lines = [(str(trace.get("name", "")), [y for y in trace.get("y", ()) if is_number(y)]) for trace in panel.traces]
    rows = [[name, ys[0], ys[-1], min(ys), max(ys)] for name, ys in lines if ys]
    if not rows:
        return ""
    return _folded(["", "first", "last", "smallest", "largest"], rows)


def _folded(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return f"<details><summary>Values</summary>{_table(columns, rows)}</details>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    body = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    whole = ' class="number"' if is_number(value) else ""
    return f"<td{whole}>{html.escape(number(value))}</td>"


def number(value: Any) -> str:
    """Return a value as a reader wants it: floats to four significant digits, and thousands apart."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def _data(panels: Sequence[Panel]) -> str:
    """Return the charts as JSON that cannot end the script element that holds it."""
    charts = [{"traces": _escaped(list(panel.traces)), "layout": _escaped(panel.layout)} for panel in panels]
    return to_json(charts).replace("<", "\\u003c")


def _escaped(value: Any) -> Any:
    """Return the data with markup in strings escaped, which Plotly would interpret."""
    if isinstance(value, Mapping):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(inner) for inner in value]
    return html.escape(value, quote=False) if isinstance(value, str) else value


@cache
def _plotly() -> str:
    """Return Plotly's library, compressed."""
    from plotly.offline import get_plotlyjs  # noqa: PLC0415 - slow to import

    library: str = get_plotlyjs()
    return base64.b64encode(gzip.compress(library.encode(), mtime=0)).decode()


def _asset(name: str) -> str:
    return files("raytrain.run.report").joinpath(name).read_text(encoding="utf-8")
