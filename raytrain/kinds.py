"""Kinds of runs: what the command can check, list, run and report, named by entry points."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from raytrain.errors import RecipeError
from raytrain.recipe import Recipe
from raytrain.registry import near, place_of, resolve

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
class Kind:
    """A kind of runs, as names of what it brings: "module:attribute", imported when it is used.

    Attributes:
        recipe: the class of its recipes.
        run: (recipe, Order) -> Result.
        recipes: the folder of its shipped recipes.
        load: (run's folder, overrides) -> TrainedModel, for `evaluate`, `predict` and `export`; "" without a
            model.
        panels: (RunDirectory) -> list[Panel], what `raytrain report` shows of a run.
        check: (recipe) -> lines that `raytrain check` prints below the fields.
        tables: title -> the table of what a recipe can choose by name.
        remarks: title -> () -> name -> what `raytrain list` adds about it on this machine.
        shorthand: the field that a mere "module:attribute" in place of a recipe stands for.
        packages: whose code all machines of a run must share, and which `submit --with-code` takes along.
        requires: distributions whose versions a run records, beside Python, torch, Ray and NumPy.
    """

    recipe: str
    run: str
    recipes: Path | None = None
    load: str = ""
    panels: str = ""
    check: str = ""
    tables: Mapping[str, str] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)
    shorthand: str = ""
    packages: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    def recipe_class(self) -> type[Recipe]:
        """Return the class of its recipes."""
        found: type[Recipe] = resolve({}, self.recipe, "kind")
        return found

    def table(self, title: str) -> Mapping[str, str]:
        """Return one of its tables, name -> "module:attribute"."""
        found: Mapping[str, str] = resolve({}, self.tables[title], title)
        return found

    def shipped(self) -> list[Path]:
        """Return the files of its shipped recipes."""
        return sorted(self.recipes.glob("*.toml")) if self.recipes else []


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


def shared_packages() -> list[str]:
    """Return the packages whose code all machines of a run share: ours, and those of every installed kind."""
    named = {point.module.partition(".")[0] for point in kind_points().values()}  # of one that cannot be loaded, too
    return sorted({"raytrain", *named, *(package for kind in load_kinds().values() for package in kind.packages)})
