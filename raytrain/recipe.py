"""Recipes: the configuration of a run, as typed and frozen data.

A recipe is read from TOML; its values replace the defaults of its class, and overrides replace its values. The command
line, searches and federated runs all override by `Recipe.with_overrides`. Unknown fields are errors. An error names the
dotted field, the expectation, the value, and the known fields.
"""

import inspect
import logging
import os
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from raytrain.errors import RecipeError
from raytrain.files import read_bytes
from raytrain.habits import HABITS
from raytrain.overrides import apply_overrides, as_table
from raytrain.registry import resolve, suggest

logger = logging.getLogger(__name__)

MAX_RECIPE_BYTES = 64 << 20  # a run's recipe contains the classes or characters of its data
SHOWN_CHARACTERS = 500
"""Length to which an error message cuts a wrong value."""

AbsolutePath = Annotated[Path, AfterValidator(lambda path: Path(os.path.abspath(path.expanduser())))]
"""A path that is made absolute on load, because workers run in another working directory."""


class Section(BaseModel):
    """A section of a recipe: frozen, without unknown fields, all numbers finite.

    One that has a name can be written as its name alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _spell_out_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) and "name" in cls.model_fields else value

    @model_validator(mode="before")
    @classmethod
    def _name_the_unknown(cls, value: Any) -> Any:
        """Name the first unknown field and the known ones, which pydantic's own message lacks."""
        unknown = [key for key in value if key not in cls.model_fields] if isinstance(value, Mapping) else []
        if unknown:
            raise PydanticCustomError(
                "unknown_field",
                "no such field; {known}",
                {"field": unknown[0], "known": suggest(unknown[0], cls.model_fields, HABITS.get(unknown[0], ""))},
            )
        return value


class Options(Section):
    """The options of a named component (task, optimizer, ...): its name, and the fields that it declares."""

    name: str


OptionsT = TypeVar("OptionsT", bound=Options)


def options_parameter(factory: Any, base: type[Options] = Options) -> type[Options]:
    """Return the class of a function's options: the annotation of its parameter of type `Options`.

    Returns `base` for a function without such a parameter, and for any other object.

    Raises:
        RecipeError: its annotations cannot be resolved.
    """
    try:
        hints = typing.get_type_hints(factory) if inspect.isfunction(factory) else {}
    except (NameError, TypeError, AttributeError) as error:
        place = f"{factory.__module__}:{factory.__qualname__}"
        raise RecipeError(f"{place}: its annotations cannot be read: {type(error).__name__}: {error}") from error
    found = [
        hint for key, hint in hints.items() if key != "return" and isinstance(hint, type) and issubclass(hint, Options)
    ]
    return found[0] if found else base


@cache  # equal recipes need equal classes
def merge_options(declared: type[Options], base: type[OptionsT], what: str) -> type[OptionsT]:
    """Return a class of options with the fields of both.

    Args:
        declared: by a component; may already be a subclass of `base`.
        base: options of all components of this type.
        what: the recipe's field that names the component, for error messages.

    Raises:
        RecipeError: both have a field of the same name.
    """
    if issubclass(declared, base):
        return declared
    if issubclass(base, declared):
        return base
    if twice := (declared.model_fields.keys() & base.model_fields.keys()) - Options.model_fields.keys():
        raise RecipeError(
            f"{what}: {declared.__module__}:{declared.__qualname__} has a field {min(twice)!r}, which {base.__name__} "
            "has already; give it another name"
        )
    bases: tuple[type[Any], ...] = (declared, base)
    return create_model(declared.__name__, __base__=bases, __module__=declared.__module__, __doc__=declared.__doc__)


@dataclass(frozen=True, slots=True, eq=False)
class NamedSection:
    """Validates a section by the options of the component that its `name` names.

    Attributes:
        table: short names of components.
        what: the section's name in the recipe.
        options_of: component -> class of its options.
        default: name of a section that gives none.
        known: name -> class of its options, or None if the component has to be imported for it.
    """

    table: Mapping[str, str]
    what: str
    options_of: Callable[[Any], type[Options]]
    default: str | None
    known: Callable[[str], type[Options] | None]

    def __call__(self, value: Any) -> Options:
        """Return the section's options, validated."""
        if isinstance(value, Options):
            return value
        section = as_table(value)
        if isinstance(section, Mapping) and self.default is not None:
            section = {"name": self.default, **section}
        if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
            known = {"known": suggest("", self.table)}
            raise PydanticCustomError("no_name", "expected a table with a name; {known}", known)
        return self.options(section["name"]).model_validate(section)

    def options(self, name: str) -> type[Options]:
        """Return the class of the options of a component by its name.

        Raises:
            RecipeError: there is no such name.
        """
        return self.known(name) or self.options_of(resolve(self.table, name, f"{self.what}.name"))


def options_by_name(
    table: Mapping[str, str],
    what: str,
    options_of: Callable[[Any], type[Options]],
    default: str | None = None,
    known: Callable[[str], type[Options] | None] = lambda name: None,  # noqa: ARG005
) -> BeforeValidator:
    """Return a pydantic validator for a section whose `name` determines its options; see `NamedSection`."""
    return BeforeValidator(NamedSection(table, what, options_of, default, known))


class Recipe(Section):
    """The fields that recipes of every kind have.

    Attributes:
        kind: of the run, which is the command that runs it.
        name: of the recipe, with which the name of a run's folder begins.
        seed: of all random draws.
    """

    kind: str
    name: str = Field("run", pattern=r"^[\w.-]+$")
    seed: int = Field(0, ge=0, lt=2**63)

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Validate nested plain data and return the recipe.

        Raises:
            RecipeError: one line for each wrong field.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise RecipeError(explain_errors(error)) from None

    def with_overrides(self, changes: Mapping[str, Any]) -> Self:
        """Return this recipe with dotted fields overridden; see `parse_with`."""
        return self.parse_with(self.to_dict(only_set=True), changes)

    @classmethod
    def parse_with(cls, raw: Mapping[str, Any], changes: Mapping[str, Any]) -> Self:
        """Validate nested plain data with dotted fields overridden, and return the recipe.

        A section whose name changes loses the options that only the old name has; a warning lists them.

        Raises:
            RecipeError: as `parse`, or the parent of an overridden field is not a section.
        """
        return cls.parse(apply_overrides(_without_stale(raw, cls, changes), changes))

    def to_dict(self, *, only_set: bool = False) -> dict[str, Any]:
        """Return the recipe as nested plain data; with `only_set`, without defaults."""
        return self.model_dump(mode="json", exclude_none=True, exclude_unset=only_set)

    def to_toml(self) -> str:
        """Return the whole recipe, defaults included, as TOML."""
        return tomli_w.dumps(self.to_dict())


def _without_stale(
    raw: Mapping[str, Any], model: type[BaseModel], changes: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Return `raw` without options that are stale because `changes` replaces their section's name.

    Args:
        raw: the recipe, or a section of it.
        model: the class that will validate it.
        changes: dotted field of the recipe -> new value.
        prefix: of the section, such as "task.".
    """
    result = dict(raw)
    for field, info in model.model_fields.items():
        readers = [getattr(one, "func", None) for one in info.metadata]
        named = next((one for one in readers if isinstance(one, NamedSection)), None)
        section, where = as_table(raw.get(field)), f"{prefix}{field}"
        if named is None or not isinstance(section, Mapping):
            continue
        old, short = section.get("name", named.default), changes.get(where)
        new = changes.get(f"{where}.name", short if isinstance(short, str) else old)
        if not isinstance(new, str):
            continue
        options = named.options(new)
        if new != old:
            section = {key: value for key, value in section.items() if f"{where}.{key}" not in changes}
            section, dropped = _fitting({**section, "name": new}, options)
            if dropped:
                fields = ", ".join(f"{where}.{path}" for path in dropped)
                logger.warning("%s.name=%s: dropped %s, which %s does not take", where, new, fields, new)
        result[field] = _without_stale(section, options, changes, f"{where}.")
    return result


def _fitting(section: Mapping[str, Any], options: type[BaseModel]) -> tuple[dict[str, Any], list[str]]:
    """Return the part of a section that a class of options accepts, and the dotted fields of the rest."""
    kept, dropped = apply_overrides(section, {}), list[str]()
    while True:
        try:
            options.model_validate(kept)
        except ValidationError as error:
            found = [_pop(kept, _path(detail)) for detail in error.errors()]
            if any(found):
                dropped += filter(None, found)
                continue
        return kept, dropped


def _pop(section: dict[str, Any], path: list[str | int]) -> str:
    """Remove the innermost field on the path of an error; return it as a dotted field, or ""."""
    holders: list[tuple[Any, int]] = []
    place: Any = section
    for depth, part in enumerate(path):
        if isinstance(place, dict) and part in place and (depth or part != "name"):
            holders.append((place, depth))
        elif not (isinstance(place, list) and isinstance(part, int) and part < len(place)):
            break
        place = place[part]
    if not holders:
        return ""
    holder, depth = holders[-1]
    del holder[path[depth]]
    return ".".join(str(part) for part in path[: depth + 1])


def read_toml(source: str, shipped: Iterable[Path]) -> tuple[dict[str, Any], Path]:
    """Read a recipe: a file, the one in a run's folder, or one in a folder of `shipped`, by its stem.

    Returns:
        The nested data, and the file.

    Raises:
        RecipeError: there is no such file, or it is not TOML.
    """
    files = {file.stem: file for folder in shipped for file in folder.glob("*.toml")}
    given = Path(source) / "recipe.toml" if Path(source).is_dir() else Path(source)
    path = given if given.is_file() else files.get(source)
    if path is None:
        raise RecipeError(
            f"{source!r} is neither a file, nor a run's folder with a recipe.toml, nor a shipped recipe, nor a task as "
            f"module:attribute; {suggest(source, files)}"
        )
    data = read_bytes(path, RecipeError, MAX_RECIPE_BYTES)
    try:
        return tomllib.loads(data.decode()), path
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError includes invalid UTF-8 and numbers of thousands of digits
        raise RecipeError(f"{path}: not a TOML file: {error}") from None


def dotted_fields(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted field, value) for each leaf of nested data."""
    for key, value in raw.items():
        if isinstance(value, Mapping):
            yield from dotted_fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def explain_errors(error: ValidationError, within: str = "") -> str:
    """Return an error message with a line for each wrong field; `within` is the name of the section."""
    return "\n".join(_explain(detail, within) for detail in error.errors())


def _explain(detail: ErrorDetails, within: str) -> str:
    """Return one line with the dotted field, the expectation and the value."""
    field = ".".join([*filter(None, [within]), *(str(part) for part in _path(detail))]) or "recipe"
    if detail["type"] == "unknown_field":
        return f"{field}: {detail['msg']}"
    if detail["type"] == "missing":
        return f"{field}: required, and not given"
    message = detail["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
    came = "" if detail["type"] == "value_error" else f"; got {_shown(detail['input'])}"  # our own messages contain it
    return f"{field}: {message}{came}"


def _path(detail: ErrorDetails) -> list[str | int]:
    """Return the parts of the dotted field of an error."""
    unknown = [detail["ctx"]["field"]] if detail["type"] == "unknown_field" else []
    return [*detail["loc"], *unknown]


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits
        return "a number that is too large to be shown"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."
