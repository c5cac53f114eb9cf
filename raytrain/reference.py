"""The fields of recipes: type, default and meaning of each, read from the classes that validate them."""

import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeGuard

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from raytrain.errors import RecipeError
from raytrain.habits import HABITS
from raytrain.kinds import Kind, kind_entry_points, load_kind
from raytrain.recipe import NamedSection, Options, Recipe, Section
from raytrain.registry import suggest, summary

BOUNDS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
ARGUMENTS = {
    "lr": "learning rate, which the schedule multiplies",
    "betas": "decays of the moments, per step",
    "eps": "added to denominators",
    "momentum": "decay of the momentum, per step",
    "weight_decay": "decay of the weights, per unit of the learning rate where it is decoupled",
    "nesterov": "whether momentum is Nesterov's",
    "first_order_lr": "learning rate of AdamW",
    "r": "rank of the update",
    "target_modules": "patterns of the names of the layers that get an adapter",
}
"""Meaning of constructor arguments, which the packages that define them document."""
PAGE = """# Fields of a recipe

Type, default and meaning of each field; `raytrain explain FIELD` prints one, also by what other libraries call it. The
second column names the components that have the field: `optimizer.momentum` exists with `optimizer.name = "sgd"`, and
not with `"adamw"`. A name of your own is `module:attribute`. This page is printed by `raytrain explain --all`.
"""


@dataclass(frozen=True, slots=True)
class RecipeField:
    """A field of a recipe.

    Attributes:
        name: dotted.
        owner: names of the components whose option it is, such as "adamw"; "": the field is always there.
        type: of its value, with bounds.
        default: as TOML would say it; "required" without one.
        meaning: what its class says of it, with its unit.
        choices: values it can take, if they are listed.
    """

    name: str
    owner: str
    type: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()


def recipe_fields(kind: Kind) -> Iterator[RecipeField]:
    """Yield the fields of a kind's recipes, and the options of the components that they can name."""
    yield from _fields(kind.recipe_class(), "", "")


def explain_field(name: str) -> list[tuple[str, RecipeField]]:
    """Return (kind, field) for each field of a name, also by what other libraries call it.

    Raises:
        RecipeError: no recipe has such a field.
    """
    known: set[str] = set()
    for kind in sorted(kind_entry_points(), key=_train_first):  # the others import more
        fields = [(kind, field) for field in recipe_fields(load_kind(kind))]
        for wanted in filter(None, (name, HABITS.get(name), f"{name}.name")):
            if found := [each for each in fields if each[1].name == wanted]:
                return found
        known |= {field.name for _, field in fields}
    similar = suggest(name, known).partition("known: ")[0]
    raise RecipeError(f"{name}: no such field; {similar}raytrain explain --all prints all of them")


def _fields(model: type[BaseModel], prefix: str, owner: str) -> Iterator[RecipeField]:
    meanings = attribute_docs(model)
    for name, info in model.model_fields.items():
        if prefix and name == "name" and issubclass(model, Options):
            continue  # the section says which names there are
        dotted, named = f"{prefix}{name}", _named_section(info)
        if named:
            yield from _component_fields(named, dotted, owner)
        elif _is_section(info.annotation):
            yield from _fields(info.annotation, f"{dotted}.", owner)
        else:
            default, choices = _default(info), _choices(info.annotation) or tuple(map(str, info.examples or ()))
            meaning = meanings.get(name) or ARGUMENTS.get(name, "")
            yield RecipeField(dotted, owner, _type_name(info), default, meaning, choices)


def _component_fields(named: NamedSection, section: str, owner: str) -> Iterator[RecipeField]:
    """Yield `section.name`, and the options of each component that it can name; those of all of them once."""
    names = tuple(named.table)
    default = repr(named.default).replace("'", '"') if named.default else "required"
    yield RecipeField(
        f"{section}.name", owner, "name", default, f"one of {', '.join(names)}, or module:attribute", names
    )
    owners: dict[RecipeField, list[str]] = {}
    for name in names:
        for field in _fields(named.options(name), f"{section}.", ""):
            owners.setdefault(field, []).append(name)
    for field, having in owners.items():
        meaning = field.meaning or f"argument of {', '.join(named.table[name].partition(' ')[0] for name in having)}"
        of = field.owner if len(having) == len(names) else ", ".join(having)
        yield replace(field, owner=of or owner, meaning=meaning)


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Return whether a field is a section of its recipe, and not a recipe itself, as the base of a search."""
    return isinstance(annotation, type) and issubclass(annotation, Section) and not issubclass(annotation, Recipe)


def _named_section(info: FieldInfo) -> NamedSection | None:
    """Return the section that a field's validator reads by a name, if it does."""
    readers = (getattr(one, "func", None) for one in info.metadata)
    return next((one for one in readers if isinstance(one, NamedSection)), None)


def attribute_docs(model: type) -> dict[str, str]:
    """Return attribute -> its text in the docstrings of a class and of its bases.

    >>> attribute_docs(RecipeField)["name"]
    'dotted.'
    """
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        lines = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")[2].splitlines()
        names: list[str] = []
        for line in lines:
            start = re.fullmatch(r"    (\w[\w, ]*?): (.*)", line)
            if start:
                names = start[1].split(", ")
                found |= dict.fromkeys(names, start[2])
            elif line.startswith("        "):
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
            else:
                break
    return found


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.default
    if value is None or value is PydanticUndefined:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, BaseModel):
        return str(getattr(value, "name", ""))
    return f'"{value}"' if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)


def _choices(annotation: Any) -> tuple[str, ...]:
    """Return the values of a type that has few."""
    if annotation is bool:
        return ("true", "false")
    if typing.get_origin(annotation) is Literal:
        return tuple(str(value) for value in typing.get_args(annotation))
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return tuple(value for part in typing.get_args(annotation) for value in _choices(part))
    return ()


def _type_name(info: FieldInfo) -> str:
    return f"{_annotation_name(info.annotation)} {_bounds(info.metadata)}".strip()


def _bounds(metadata: Iterable[object]) -> str:
    """Return the bounds of a number, as ">= 0, < 1"."""
    found = [
        (sign, getattr(one, name)) for one in metadata for kind, (sign, name) in BOUNDS.items() if isinstance(one, kind)
    ]
    return ", ".join(f"{sign} {'2^63' if bound == 2**63 else f'{bound:g}'}" for sign, bound in found)


def _annotation_name(annotation: Any) -> str:
    """Return a type in the words of a recipe."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Literal, types.UnionType, typing.Union):
        parts = [f'"{part}"' if origin is Literal else _annotation_name(part) for part in inside]
        return " or ".join(part for part in parts if part != "nothing")
    if origin is typing.Annotated:
        return f"{_annotation_name(inside[0])} {_bounds(inside[1:])}".strip()
    if origin is tuple:
        return f"list of {_annotation_name(inside[0])}"
    plain = origin or annotation
    if isinstance(plain, type) and issubclass(plain, Mapping | BaseModel):
        return "table"
    names = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "text", NoneType: "nothing"}
    return names.get(annotation, "any")


def reference_page(kinds: Mapping[str, Kind]) -> str:
    """Return the reference of all fields as Markdown; fields of an earlier kind are not repeated.

    Args:
        kinds: name -> kind.
    """
    parts, seen = [PAGE], set[RecipeField]()
    for name in sorted(kinds, key=_train_first):
        parts.append(f"\n## {name}\n\n| field | of | type | default | meaning |\n|---|---|---|---|---|\n")
        fields = [field for field in recipe_fields(kinds[name]) if field not in seen]
        parts += [_row(f"`{one.name}`", one.owner, one.type, one.default, one.meaning) for one in fields]
        seen.update(fields)
        for title in kinds[name].tables:
            table = kinds[name].table(title)
            parts.append(f"\n### {title}\n\n| name | |\n|---|---|\n")
            parts += [_row(f"`{each}`", summary(table, each)) for each in table]
    return "".join(parts)


def _train_first(kind: str) -> tuple[bool, str]:
    return kind != "train", kind


def _row(*cells: str) -> str:
    escaped = [cell.replace("|", "\\|").replace("\n", "\\n") for cell in cells]
    return f"| {' | '.join(escaped)} |\n"
