"""Kinds of runs, from entry points: what the command checks, lists, runs and reports for each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from raytrain.errors import RecipeError
from raytrain.recipe import Recipe
from raytrain.registry import error_location, resolve, suggest

GROUP = "raytrain.kinds"
"""Group of entry points; each is a `Kind`."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of one run of a recipe.

    Attributes:
        out: the run's folder.
        resume: continue the run in `out`, which otherwise has to be new.
        address: "auto" or "HOST:PORT" of a running Ray cluster, "local" for a new one; None: the kind decides.
    """

    out: Path
    resume: bool = False
    address: str | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of runs; its functions and classes are "module:attribute", imported when used.

    Attributes:
        recipe: class of its recipes.
        run: (recipe, RunOptions) -> Result.
        recipes: folder of its shipped recipes.
        load: (run's folder, overrides) -> TrainedModel, for `evaluate`, `predict` and `export`; "": no model.
        panels: (RunDirectory) -> list[Panel], shown by `raytrain report`.
        check: (recipe) -> lines that `raytrain check` prints after the fields.
        app: (folder, overrides, address or None) -> None; runs the app of another framework in a folder, as it is, for
            `--app`; "": there are none.
        dry_run: (recipe) -> lines about a step that is taken in this process, for `raytrain check --dry`; "": none.
        tables: title -> registry of components that a recipe selects by name.
        remarks: title -> () -> name -> remark about this machine in `raytrain list`.
        shorthand: field that "module:attribute" in place of a recipe sets.
        accepts: (object) -> whether an object at "module:attribute" is of this kind where the command names none; "":
            only `train` is assumed.
        packages: packages whose code has to be equal on all machines of a run; `submit --with-code` uploads them.
        requires: distributions whose versions a run records, besides Python, torch, Ray and NumPy.
    """

    recipe: str
    run: str
    recipes: Path | None = None
    load: str = ""
    panels: str = ""
    check: str = ""
    app: str = ""
    dry_run: str = ""
    tables: Mapping[str, str] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)
    shorthand: str = ""
    accepts: str = ""
    packages: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    def recipe_class(self) -> type[Recipe]:
        """Return the class of its recipes."""
        found: type[Recipe] = resolve({}, self.recipe, "kind")
        return found

    def table(self, title: str) -> Mapping[str, str]:
        """Return one of its registries, name -> "module:attribute"."""
        found: Mapping[str, str] = resolve({}, self.tables[title], title)
        return found

    def shipped(self) -> list[Path]:
        """Return the files of its shipped recipes."""
        return sorted(self.recipes.glob("*.toml")) if self.recipes else []


def kind_entry_points() -> dict[str, EntryPoint]:
    """Return the entry points of installed kinds by name."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def load_kind(name: str) -> Kind:
    """Load an installed kind by name.

    Raises:
        RecipeError: it is not installed, or cannot be imported.
    """
    points = kind_entry_points()
    if name not in points:
        raise RecipeError(f"kind: no such kind {name!r}; {suggest(name, points)}")
    try:
        kind: Kind = points[name].load()
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"kind: {name} cannot be loaded from {points[name].value}: {type(error).__name__}: {error}"
            f"{error_location(error)}"
        ) from error
    return kind


def load_kinds(complain: Callable[[RecipeError], None] = lambda error: None) -> dict[str, Kind]:  # noqa: ARG005
    """Load all installed kinds, by name, without those that cannot be imported.

    Args:
        complain: called with the error of each of these.
    """
    kinds = {}
    for name in kind_entry_points():
        try:
            kinds[name] = load_kind(name)
        except RecipeError as error:
            complain(error)
    return kinds


def shared_packages() -> list[str]:
    """Return the packages whose code all machines of a run share: ours, and those of every installed kind."""
    named = {
        point.module.partition(".")[0] for point in kind_entry_points().values()
    }  # of one that cannot be loaded, too
    return sorted({"raytrain", *named, *(package for kind in load_kinds().values() for package in kind.packages)})
