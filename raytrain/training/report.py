"""Panels of a training run's report page: loss, metrics, learning rate, throughput, communication, events."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from raytrain.json_files import is_number
from raytrain.run.directory import RunDirectory
from raytrain.run.report.panel import Panel, Series, line_chart, series, table
from raytrain.run.rows import read_jsonl
from raytrain.terminal import format_time

MetricsRows = Sequence[Mapping[str, Any]]

CHARTS = (
    ("Learning rate", ("lr",), "learning rate"),
    ("Gradient norm", ("gradient_norm",), "norm before clipping"),
    ("Projected gradient", ("projected_gradient",), "root mean square"),
    ("Perturbations not used", ("skipped",), "in a step"),
    ("Synchronisation interval", ("every", "delay"), "steps"),
    ("Bytes sent", ("bytes_sent",), "bytes of the first worker"),
    ("Communication and data wait", ("communication_seconds", "data_wait_seconds"), "seconds since the start"),
    ("Communication hidden by steps", ("overlap_ratio",), "share of its time"),
)
"""Title, fields of the training rows, and label of the vertical axis; a chart without data is left out."""
DECADES = 30


def training_panels(run: RunDirectory) -> list[Panel]:
    """Return what a training run has recorded so far, as panels."""
    recorded = read_jsonl(run.metrics)
    steps = [_without_zeros(row) for row in recorded if "valid" not in row]
    evaluations = [row for row in recorded if "valid" in row]
    charts = [
        _loss(steps, evaluations),
        *_metrics(evaluations),
        _throughput(steps),
        *(
            line_chart(title, {field.replace("_", " "): series(steps, field) for field in fields}, x="step", y=label)
            for title, fields, label in CHARTS
        ),
        _events(run),
    ]
    return [panel for panel in charts if panel is not None]


def _without_zeros(row: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the communication of a worker that is alone."""
    silent = () if row.get("bytes_sent", 0) else ("bytes_sent", "communication_seconds", "overlap_ratio")
    return {field: value for field, value in row.items() if field not in silent}


def _loss(steps: MetricsRows, evaluations: MetricsRows) -> Panel | None:
    held_out = [{"step": row["step"], **row["valid"]} for row in evaluations]
    lines = {"training": series(steps, "loss"), "held-out": series(held_out, "loss")}
    return line_chart("Loss", lines, x="step", y="loss", log_y=_spans_decades(lines.values()))


def _spans_decades(lines: Iterable[Series]) -> bool:
    """Return whether losses are positive, and fall so far that on a linear axis the end would look flat."""
    values = [value for _, ys in lines for value in ys if value is not None]
    return bool(values) and min(values) > 0 and max(values) > DECADES * min(values)


def _metrics(evaluations: MetricsRows) -> list[Panel | None]:
    names = dict.fromkeys(name for row in evaluations for name in row["valid"] if name != "loss")
    flat = [{"step": row["step"], **row["valid"]} for row in evaluations]
    return [
        line_chart(f"Held-out {name.replace('_', ' ')}", {name: series(flat, name)}, x="step", y=name) for name in names
    ]


def _throughput(steps: MetricsRows) -> Panel | None:
    """Return samples per second between consecutive rows; time between attempts does not count."""
    timed = [row for row in steps if all(is_number(row.get(field)) for field in ("step", "samples", "seconds"))]
    speeds = [
        {
            "step": after["step"],
            "speed": (after["samples"] - before["samples"]) / (after["seconds"] - before["seconds"]),
        }
        for before, after in pairwise(timed)
        if after["seconds"] > before["seconds"]
    ]
    return line_chart("Throughput", {"samples": series(speeds, "speed")}, x="step", y="samples per second")


def _events(run: RunDirectory) -> Panel | None:
    attempts = [
        (row.get("time", 0.0), f"attempt from step {row['from_step']}", f"{len(row.get('workers', []))} worker(s)")
        for row in read_jsonl(run.attempts)
    ]
    restarts = [
        (row.get("time", 0.0), "restart", "; ".join(f"worker {rank}: {cause}" for rank, cause in workers))
        for row in read_jsonl(run.restarts)
        for workers in [sorted(row["workers"].items())]
    ]
    events = [[format_time(when), what, detail] for when, what, detail in sorted([*attempts, *restarts])]
    return table("Events", ["time", "event", "detail"], events)
