"""The runs in a folder, from what each has left so far."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytrain.errors import RecipeError
from raytrain.json_files import is_number, read_json
from raytrain.run.directory import RunDirectory
from raytrain.run.result import Result
from raytrain.run.rows import read_jsonl


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run in a line.

    Attributes:
        folder: the run's.
        kind: of its recipe.
        status: "running", as its result says, "killed" without one, or "damaged" where it cannot be read.
        started: time of its first attempt, in seconds since the epoch.
        best: {"metric", "value", "step"} of its best evaluation, or of the last one of a run without a result.
    """

    folder: Path
    kind: str
    status: str
    started: float
    best: Mapping[str, Any] = field(default_factory=dict)


def list_runs(folder: Path) -> list[RunSummary]:
    """Return the runs in a folder, the newest first.

    Raises:
        RecipeError: there is no such folder.
    """
    if not folder.is_dir():
        raise RecipeError(f"FOLDER: {folder} does not exist; runs are in runs/, or where --out put them")
    runs = [_summary(file.parent) for file in folder.glob("*/recipe.toml")]
    return sorted(runs, key=lambda run: run.started, reverse=True)


def _summary(folder: Path) -> RunSummary:
    run = RunDirectory(folder.absolute())
    attempts = read_jsonl(run.attempts)
    started = attempts[0].get("time", 0.0) if attempts else run.recipe.stat().st_mtime
    if run.in_use():
        return RunSummary(folder, _kind(run), "running", started, _last_evaluation(run))
    if not run.result.is_file():
        return RunSummary(folder, _kind(run), "killed", started, _last_evaluation(run))
    try:
        result: Result = read_json(run.result, Result, RecipeError)
    except RecipeError:  # one damaged run must not hide the others
        return RunSummary(folder, _kind(run), "damaged", started, _last_evaluation(run))
    return RunSummary(folder, _kind(run), result.status, started, result.best or _last_evaluation(run))


def _kind(run: RunDirectory) -> str:
    try:
        return str(tomllib.loads(run.recipe.read_text()).get("kind", "train"))
    except (OSError, ValueError):
        return "?"


def _last_evaluation(run: RunDirectory) -> dict[str, Any]:
    """Return the first metric of the last evaluation."""
    rows = [row for row in read_jsonl(run.metrics) if row.get("valid")]
    if not rows:
        return {}
    metric, value = next(iter(rows[-1]["valid"].items()))
    value = value if is_number(value) else None
    return {"metric": metric, "value": value, "step": rows[-1]["step"]}
