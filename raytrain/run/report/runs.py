"""The report of runs of any kind: the panels of each, on one page."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raytrain.errors import RecipeError
from raytrain.files import write_atomic
from raytrain.json_files import read_json
from raytrain.recipe import read_toml
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
    names = _names(list(runs))
    found = {names[folder]: panels(RunDirectory(Path(folder).absolute())) for folder, panels in runs.items()}
    figures = {names[folder]: _figures(Path(folder)) for folder in runs}
    if len(runs) == 1:
        (shown,), (first,) = found.values(), figures.values()
    else:
        shown, first = [_side_by_side(figures), *compared(found)], {}
    folders = ", ".join(str(Path(folder).absolute()) for folder in runs)
    html = render(" and ".join(found), _about(list(runs)), first, shown, folders)
    try:
        write_atomic(page, html.encode())
    except OSError as error:
        raise RecipeError(f"--output: cannot write {page}: {error.strerror or error}") from error


def _names(folders: list[str]) -> dict[str, str]:
    """Return the names of runs: the last part of each path where those differ, or else the paths."""
    short = {folder: Path(folder).absolute().name for folder in folders}
    return short if len(set(short.values())) == len(folders) else {folder: folder for folder in folders}


def _about(folders: list[str]) -> str:
    """Return the kinds and names of the recipes of runs."""
    recipes = [read_toml(folder, [])[0] for folder in folders]
    named = (" ".join(str(recipe[field]) for field in ("kind", "name") if field in recipe) for recipe in recipes)
    return ", ".join(dict.fromkeys(named))


def _side_by_side(figures: Mapping[str, Mapping[str, Any]]) -> Panel:
    """Return what the results of runs say as a table with a column for each."""
    labels = dict.fromkeys(label for each in figures.values() for label in each)
    rows = [[label, *(each.get(label) for each in figures.values())] for label in labels]
    return Panel("Results", columns=["", *figures], rows=rows)


def _figures(folder: Path) -> dict[str, Any]:
    """Return what `result.json` says, or that the run has not ended."""
    file = RunDirectory(folder.absolute()).result
    if not file.is_file():
        return {"status": "running, or cut off"}
    result = read_json(file, dict[str, Any])
    metrics = {f"{name} (held out)": value for name, value in result.get("metrics", {}).items()}
    rest = {name: result.get(name) for name in ("seconds", "restarts", "error")}
    shown = {"status": result.get("status"), **metrics, **result.get("figures", {}), **rest}
    return {name.replace("_", " "): value for name, value in shown.items() if value or name in metrics}
