"""The report of runs of any kind: the panels of each, on one page."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raytrain.errors import RecipeError
from raytrain.files import write_atomic
from raytrain.json_files import read_json
from raytrain.run.directory import RunDirectory
from raytrain.run.report.page import render
from raytrain.run.report.panel import Panel, compared

Panels = Callable[[RunDirectory], list[Panel]]


def report_on(runs: Mapping[str, Panels], page: Path) -> None:
    """Write the report of runs, as far as they are.

    Args:
        runs: folder -> what makes the panels of its kind; several are compared.
        page: the file to write; it is complete afterwards, or as it was.

    Raises:
        RecipeError: none of the runs has a report, or the page cannot be written.
    """
    if not runs:
        raise RecipeError("RUN: the kind of this run has no report")
    found = {folder: panels(RunDirectory(Path(folder).absolute())) for folder, panels in runs.items()}
    names = _names(list(found))
    several = len(found) > 1
    shown = compared({names[folder]: each for folder, each in found.items()}) if several else next(iter(found.values()))
    figures = {
        f"{names[folder]}: {label}" if several else label: value
        for folder in found
        for label, value in _figures(Path(folder)).items()
    }
    folders = ", ".join(str(Path(folder).absolute()) for folder in found)
    html = render(" and ".join(names.values()), "", figures, shown, folders)
    try:
        write_atomic(page, html.encode())
    except OSError as error:
        raise RecipeError(f"--output: cannot write {page}: {error.strerror or error}") from error


def _names(folders: list[str]) -> dict[str, str]:
    """Return the names of runs: the last part of each path where those differ, or else the paths."""
    short = {folder: Path(folder).absolute().name for folder in folders}
    return short if len(set(short.values())) == len(folders) else {folder: folder for folder in folders}


def _figures(folder: Path) -> dict[str, Any]:
    """Return what `result.json` says, or that the run has not ended."""
    file = RunDirectory(folder.absolute()).result
    if not file.is_file():
        return {"status": "running, or cut off"}
    result = read_json(file, dict[str, Any])
    shown = {name: value for name, value in result.items() if value and isinstance(value, str | int | float)}
    metrics = {f"{name} (held out)": value for name, value in result.get("metrics", {}).items()}
    return {**shown, **metrics}
