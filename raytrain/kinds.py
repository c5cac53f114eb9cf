"""Kinds of runs: what the command can check, list and run. Others add theirs as entry points `raytrain.kinds`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from raytrain.errors import RecipeError
from raytrain.names import near, place_of
from raytrain.recipe import Recipe

GROUP = "raytrain.kinds"
"""Of entry points, each of which is a kind."""


@dataclass(frozen=True, slots=True)
class Order:
    """Where and how to run a recipe.

    Attributes:
        out: the run's folder.
        resume: continue what is in `out`, instead of asking for a new folder.
        address: "auto" or "HOST:PORT" of a Ray cluster that runs, "local" for one of its own; None: the kind chooses.
    """

    out: Path
    resume: bool = False
    address: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended, which is what `result.json` holds.

    Attributes:
        status: "done", "stopped early", "interrupted" or "failed".
        metrics: of the last evaluation.
        best: {"step", "value", "metric"} of the best evaluation.
        references: figures to compare the metrics with.
        steps: optimizer steps done.
        samples: examples drawn.
        seconds: time spent training, over all attempts.
        stalled_seconds: how much of it the first worker waited for data.
        bytes_sent: by the first worker.
        exchange_seconds: how long its exchanges were under way, one after the other.
        hidden_share: how much of that it did not stand still for.
        restarts: how often workers had to be started again.
        checkpoint: the last one, if there is one.
        error: why it failed.
    """

    status: Literal["done", "stopped early", "interrupted", "failed"]
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: Mapping[str, Any] = field(default_factory=dict)
    references: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    stalled_seconds: float = 0.0
    bytes_sent: int = 0
    exchange_seconds: float = 0.0
    hidden_share: float = 0.0
    restarts: int = 0
    checkpoint: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of runs.

    Attributes:
        recipe: the class of its recipes.
        recipes: the folder of its shipped recipes.
        run: "module:attribute" of (recipe, Order) -> Result; imported only to run.
        evaluate: "module:attribute" of (run's folder, overrides) -> metrics.
        tables: what can be chosen by name -> the table.
        remarks: table -> "module:attribute" of () -> name -> what `raytrain list` adds about it on this machine.
        predict: "module:attribute" of (run's folder, overrides, input file, output file, address) -> lines written;
            "": its runs cannot.
        export: "module:attribute" of (run's folder, overrides, folder to write); "": its runs cannot.
    """

    recipe: type[Recipe]
    recipes: Path
    run: str
    evaluate: str
    tables: Mapping[str, Mapping[str, str]]
    remarks: Mapping[str, str] = field(default_factory=dict)
    predict: str = ""
    export: str = ""


def kind_points() -> dict[str, EntryPoint]:
    """Return the installed kinds by name, as what they are loaded from."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def load_kind(name: str) -> Kind:
    """Return an installed kind.

    Raises:
        RecipeError: there is none of this name, or it cannot be imported.
    """
    points = kind_points()
    if name not in points:
        raise RecipeError(f"kind: no such kind {name!r}; {near(name, points)}")
    try:
        kind: Kind = points[name].load()
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"kind: {name} cannot be loaded from {points[name].value}: {type(error).__name__}: {error}{place_of(error)}"
        ) from error
    return kind


def load_kinds(complain: Callable[[RecipeError], None] = lambda error: None) -> dict[str, Kind]:  # noqa: ARG005
    """Return the installed kinds that can be loaded, by name.

    Args:
        complain: called with the error of each that cannot, which breaks none of the others.
    """
    kinds = {}
    for name in kind_points():
        try:
            kinds[name] = load_kind(name)
        except RecipeError as error:
            complain(error)
    return kinds
