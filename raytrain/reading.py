"""Recipes and runs of any kind, read by the words that a user names them with."""

from pathlib import Path
from typing import Any

from raytrain.errors import RecipeError
from raytrain.kinds import load_kind, load_kinds
from raytrain.overrides import apply_overrides
from raytrain.provenance import check_trusted
from raytrain.recipe import Recipe, read_toml
from raytrain.registry import resolve


def read_recipe(source: str, verb: str | None, trust: bool) -> tuple[dict[str, Any], Path]:
    """Return a recipe's data, with its kind and name filled in, and its file.

    "module:attribute" is short for a recipe that says no more than this, of its task or of what its kind names so.

    Args:
        source: a file, a shipped recipe, a run's folder, or "module:attribute".
        verb: kind that the recipe must be of; None: any.
        trust: whether the recipe of a fetched run may name code.

    Raises:
        RecipeError: there is none, it is of another kind than `verb`, or of a fetched run, names code and is not
            trusted.
    """
    kinds = load_kinds()
    if ":" in source and not Path(source).is_file():
        raw, file = expand_shorthand(source, verb or kind_at(source)), Path(source.partition(":")[2])
    else:
        raw, file = read_toml(source, [kind.recipes for kind in kinds.values() if kind.recipes])
        if not trust:
            check_trusted(raw, file)
    return with_kind({"name": file.stem, **raw}, verb, source), file


def with_kind(raw: dict[str, Any], verb: str | None, source: str) -> dict[str, Any]:
    """Return a recipe's data with its kind, which is `verb` unless the data says another one.

    Raises:
        RecipeError: it is of another kind than `verb`, or of one that is not installed.
    """
    raw = {"kind": verb or "train", **raw}
    if not isinstance(raw["kind"], str):
        raise RecipeError(f"kind: expected a name; got {raw['kind']!r}")
    load_kind(raw["kind"])
    if verb not in (None, raw["kind"]):
        raise RecipeError(f"kind: {source} is a recipe to {raw['kind']}: raytrain {raw['kind']} {source}")
    return raw


def expand_shorthand(place: str, verb: str) -> dict[str, Any]:
    """Return the recipe that "module:attribute" is short for.

    Raises:
        RecipeError: recipes of this kind have no short form.
    """
    field = load_kind(verb).shorthand
    if not field:
        raise RecipeError(f"{place!r}: expected a file, a run's folder, or one of raytrain list recipes")
    return apply_overrides({"kind": verb}, {field: place})


def kind_at(place: str) -> str:
    """Return the kind that accepts what is at "module:attribute", or else `train`."""
    try:
        found = resolve({}, place, "recipe")
    except RecipeError:
        return "train"  # which refuses it too, and names its field
    accepting = {name: kind.accepts for name, kind in load_kinds().items() if kind.accepts}
    return next((name for name, accepts in accepting.items() if resolve({}, accepts, "kind")(found)), "train")


def parse_recipe(raw: dict[str, Any], overrides: dict[str, Any]) -> Recipe:
    """Validate a recipe's data of any kind, with dotted fields overridden.

    Raises:
        RecipeError: as `Recipe.parse_with`.
    """
    return load_kind(raw["kind"]).recipe_class().parse_with(raw, overrides)


def recipe_of_run(run: Path) -> dict[str, Any]:
    """Return the data of the recipe of a run; the code that it names is not run.

    Raises:
        RecipeError: there is no run.
    """
    file = run / "recipe.toml"
    if not file.is_file():
        raise RecipeError(f"{run}: there is no run here (no recipe.toml); a run's folder is what --out named")
    return read_recipe(str(file), None, trust=True)[0]


def model_loader(run: Path, *, trust: bool) -> str:
    """Return `Kind.load` of the run in a folder.

    Raises:
        RecipeError: there is no run, or its kind leaves no model, or it was fetched, names code and is not trusted.
    """
    raw = recipe_of_run(run)
    if not trust:
        check_trusted(raw, run / "recipe.toml")
    load = load_kind(raw["kind"]).load
    if not load:
        raise RecipeError(f"kind: {run} is a run of the kind {raw['kind']}, which leaves no model")
    return load
