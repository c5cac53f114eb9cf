"""Recipes: what a run is, as typed and frozen data.

A recipe is read from TOML, laid over the defaults of its class and under the changes of ``--set``; all three ways of
changing one (the command line, a search, a federated run) go through `Recipe.with_overrides`. Unknown fields are
errors, and an error names the dotted field, what was expected, what came, and the fields there are.
"""

import inspect
import os
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from raytrain.names import near, resolve

AbsolutePath = Annotated[Path, AfterValidator(lambda path: Path(os.path.abspath(path.expanduser())))]
"""A path made absolute on load, because workers do not share the current folder of the command."""


class Section(BaseModel):
    """A part of a recipe: frozen, without unknown fields, and every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_the_unknown(cls, value: Any) -> Any:
        """Name the first unknown field beside the known ones, which pydantic's own message leaves out."""
        unknown = [key for key in value if key not in cls.model_fields] if isinstance(value, Mapping) else []
        if unknown:
            raise PydanticCustomError(
                "unknown_field",
                "no such field; {known}",
                {"field": unknown[0], "known": near(unknown[0], cls.model_fields)},
            )
        return value


class Options(Section):
    """The options of one named thing (a task, an optimizer): its name, and the fields that the thing declares."""

    name: str


OptionsT = TypeVar("OptionsT", bound=Options)


def declared_options(factory: Any, base: type[Options] = Options) -> type[Options]:
    """Return the options that a factory takes: the annotation of its parameter that is a subclass of `Options`.

    Returns `base` for a factory without such a parameter, and for anything that is not a function.
    """
    hints = typing.get_type_hints(factory) if inspect.isfunction(factory) else {}
    found = [
        hint for key, hint in hints.items() if key != "return" and isinstance(hint, type) and issubclass(hint, Options)
    ]
    return found[0] if found else base


@cache  # equal recipes need equal classes
def combined(declared: type[Options], base: type[OptionsT], what: str) -> type[OptionsT]:
    """Return the options that have the fields of both.

    Args:
        declared: by a thing; it may be a subclass of `base` already.
        base: what all such things have.
        what: the field that names the thing, for the error message.

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


def chosen(
    table: Mapping[str, str], what: str, options_of: Callable[[Any], type[Options]], default: str | None = None
) -> BeforeValidator:
    """Return a validator that reads a section by the options of whatever its `name` names.

    Args:
        table: the names that can be chosen.
        what: the section's name in the recipe.
        options_of: the object that the name stands for -> the class of its options.
        default: the name of a section that gives none.
    """

    def read(value: Any) -> Options:
        if isinstance(value, Options):
            return value
        section = {"name": value} if isinstance(value, str) else value
        if isinstance(section, Mapping) and default is not None:
            section = {"name": default, **section}
        if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
            raise PydanticCustomError("no_name", "expected a table with a name; {known}", {"known": near("", table)})
        found = resolve(table, section["name"], f"{what}.name")
        return options_of(found).model_validate(section)

    return BeforeValidator(read)


class Recipe(Section):
    """What every kind of recipe has."""

    kind: str
    name: str = Field("run", pattern=r"^[\w.-]+$")
    seed: int = Field(0, ge=0, lt=2**63)

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Check `raw` (nested plain data) and return the recipe.

        Raises:
            RecipeError: one line for each wrong field.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise RecipeError("\n".join(explain(detail) for detail in error.errors())) from None

    def with_overrides(self, changes: Mapping[str, Any]) -> Self:
        """Return this recipe with `changes`, a mapping of dotted field to value, laid over it."""
        return self.parse(merged(self.plain(only_set=True), changes))

    def plain(self, *, only_set: bool = False) -> dict[str, Any]:
        """Return the recipe as nested plain data; with `only_set`, without what was left to the defaults."""
        return self.model_dump(mode="json", exclude_none=True, exclude_unset=only_set)

    def to_toml(self) -> str:
        """Return the whole recipe, defaults included, as TOML."""
        return tomli_w.dumps(self.plain())


def merged(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the nested mapping `raw` with each dotted field of `changes` set; all others stay."""
    result: dict[str, Any] = {
        key: merged(value, {}) if isinstance(value, Mapping) else value for key, value in raw.items()
    }
    for dotted, value in changes.items():
        *sections, field = dotted.split(".")
        place = result
        for section in sections:
            inner = place.setdefault(section, {})
            if isinstance(inner, str):  # `task = "digits"` is short for `task.name = "digits"`
                inner = place[section] = {"name": inner}
            if not isinstance(inner, dict):
                raise RecipeError(f"{dotted}: {section} is not a section but {inner!r}")
            place = inner
        place[field] = value
    return result


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Read ``a.b=VALUE`` words, VALUE as TOML or else as a string; the last word for a field wins.

    Raises:
        RecipeError: a word is not of that form.
    """
    changes: dict[str, Any] = {}
    for word in words:
        field, equals, text = word.partition("=")
        if not equals or not all(part.isidentifier() for part in field.split(".")):
            raise RecipeError(f"{word!r}: expected FIELD=VALUE, as in optimizer.lr=0.001")
        changes[field] = parse_value(text)
    return changes


def parse_value(text: str) -> Any:
    """Read `text` as a TOML value, or else return it as it is."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def read_toml(source: str, shipped: Iterable[Path]) -> tuple[dict[str, Any], Path]:
    """Read the recipe that `source` names: a file, a run's folder, or a file in one of the folders `shipped`.

    Returns:
        The nested data, and the file it came from.

    Raises:
        RecipeError: there is no such file, or it is not TOML.
    """
    files = {file.stem: file for folder in shipped for file in folder.glob("*.toml")}
    given = Path(source) / "recipe.toml" if Path(source).is_dir() else Path(source)
    path = given if given.is_file() else files.get(source)
    if path is None:
        raise RecipeError(
            f"{source!r} is neither a file, nor a run's folder with a recipe.toml, nor a shipped recipe, nor a task as "
            f"module:attribute; {near(source, files)}"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")), path
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a TOML file: {error}") from None


def dotted_fields(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted field, value) for each leaf of nested data."""
    for key, value in raw.items():
        if isinstance(value, Mapping):
            yield from dotted_fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def explain(detail: ErrorDetails, within: str = "") -> str:
    """Return one line that names the dotted field, inside the section `within`, what was expected and what came."""
    path = [*filter(None, [within]), *map(str, detail["loc"])]
    context = detail.get("ctx", {})
    if detail["type"] == "unknown_field":
        return f"{'.'.join([*path, context['field']])}: {detail['msg']}"
    field = ".".join(path) or "recipe"
    if detail["type"] == "missing":
        return f"{field}: required, and not given"
    message = detail["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
    came = "" if detail["type"] == "value_error" else f"; got {detail['input']!r}"  # ours say it themselves
    return f"{field}: {message}{came}"
