"""Panels of a federated run's report page: quality over rounds and over bytes, who was heard, traffic, time."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from federated.records import PARTITION, ROUNDS, RoundRow
from raytrain.json_files import is_number, read_json
from raytrain.run.directory import RunDirectory
from raytrain.run.report.panel import Panel, line_chart, series, table
from raytrain.run.rows import read_jsonl

Rows = Sequence[Mapping[str, Any]]


class _Labels(TypedDict):
    """How many clients are shown, and label -> how many examples of it each of them has."""

    clients: int
    labels: dict[str, list[int]]


OVER_CLIENTS = ("clients", "worst_tenth", "spread")
"""Metrics of the model on clients' own examples."""


TRAFFIC = ("bytes_down", "bytes_up")
PLAYED = ("step", "seconds", *TRAFFIC)
"""What the row of a round has."""


def panels(run: RunDirectory) -> list[Panel]:
    """Return what a federated run has recorded so far, as panels."""
    recorded = read_jsonl(run.metrics)
    played = [row for row in recorded if all(is_number(row.get(name)) for name in PLAYED)]
    bytes_at = {0: 0} | {row["step"]: row["bytes_down"] + row["bytes_up"] for row in played}
    evaluations = [
        {"step": row["step"], "megabytes": bytes_at.get(row["step"], 0) / 1e6, **row["valid"]}
        for row in recorded
        if "valid" in row
    ]
    charts = [
        *_quality(evaluations, "step", "Held-out {} over rounds", "rounds"),
        *_quality(evaluations, "megabytes", "Held-out {} over bytes", "MB, both ways, all clients"),
        _chart("On clients' own examples", evaluations, OVER_CLIENTS, "metric"),
        _chart("Clients of a round", played, ("heard", "missing", "refused", "late"), "clients"),
        _chart("Bytes of a round", _differences(played, TRAFFIC), TRAFFIC, "bytes"),
        _chart("Time of a round", _differences(played, ["seconds"]), ["seconds"], "seconds"),
        _partition(run.path / PARTITION),
        _left_out(read_jsonl(run.path / ROUNDS, RoundRow)),
    ]
    return [panel for panel in charts if panel is not None]


def _quality(evaluations: Rows, x: str, title: str, label: str) -> list[Panel | None]:
    beside = {"step", "megabytes", *OVER_CLIENTS}
    names = [name for name in dict.fromkeys(name for row in evaluations for name in row) if name not in beside]
    return [
        line_chart(title.format(name.replace("_", " ")), {name: series(evaluations, name, x)}, x=label, y=name)
        for name in names
    ]


def _chart(title: str, points: Rows, names: Iterable[str], label: str) -> Panel | None:
    return line_chart(title, {name: series(points, name) for name in names}, x="round", y=label)


def _differences(played: Rows, names: Sequence[str]) -> Rows:
    """Return what each round added to sums."""
    before = {"step": 0, **dict.fromkeys(names, 0)}
    return [
        {"step": row["step"], **{name: row[name] - last[name] for name in names}}
        for last, row in pairwise([before, *played])
    ]


def _partition(path: Path) -> Panel | None:
    """Return the labels of the first clients, as stacked bars."""
    if not path.is_file():
        return None
    known = read_json(path, _Labels)
    traces = [
        {"type": "bar", "name": label, "x": list(range(len(counts))), "y": counts}
        for label, counts in known["labels"].items()
    ]
    layout = {"barmode": "stack", "xaxis": {"title": {"text": "client"}}, "yaxis": {"title": {"text": "examples"}}}
    return Panel("Labels of clients", traces, layout)


def _left_out(rounds: Rows) -> Panel | None:
    """Return who was not heard, and why."""
    left_out = [
        [row["round"] + 1, what]
        for row in rounds
        for what in [
            *(f"client {client}: {reason}" for client, reason in row["missing"].items()),
            *row["refusals"],
            *row["late"],
        ]
    ]
    return table("Clients that were not heard", ["round", "client and reason"], left_out)
