"""Overrides: changes of a nested recipe as a mapping of dotted field to value, and the words that say them."""

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from raytrain.errors import RecipeError


def apply_overrides(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the nested mapping `raw` with each dotted field of `changes` set; all others stay.

    Entries of lists are counted from 0: "optimizer.groups.0.lr_scale".

    Raises:
        RecipeError: a field would be in something that is neither a section nor a list, or there is no such entry.
    """
    result: dict[str, Any] = _copied(raw)
    for dotted, value in changes.items():
        *path, field = dotted.split(".")
        place: Any = result
        for depth, part in enumerate(path):
            key = _key(place, part, dotted, depth)
            inner = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
            if isinstance(inner, str):  # `task = "digits"` is short for `task.name = "digits"`
                inner = place[key] = as_table(inner)
            if not isinstance(inner, dict | list):
                raise RecipeError(f"{dotted}: {part} is not a section but {inner!r}")
            place = inner
        key = _key(place, field, dotted, len(path))
        short = isinstance(value, str) and isinstance(place, dict) and isinstance(place.get(key), dict)
        if short and "name" in place[key]:
            place[key]["name"] = value
        else:
            place[key] = value
    return result


def _key(place: dict[str, Any] | list[Any], part: str, dotted: str, depth: int) -> str | int:
    """Return where a part of a dotted field is in a section or a list."""
    where = ".".join(dotted.split(".")[:depth])
    if isinstance(place, list):
        entries = {str(number): number for number in range(len(place))}
        if part not in entries:
            there = f"has entries 0 to {len(place) - 1}" if place else "has no entries"
            raise RecipeError(f"{dotted}: the list {where} {there}; got {part!r}")
        return entries[part]
    if part.isdecimal() and part not in place:
        raise RecipeError(f"{dotted}: the recipe sets no list {where}, of which this could be an entry; set {where}")
    return part


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list | tuple) else value


def as_table(section: Any) -> Any:
    """Return a section that is given as its name alone as a table."""
    return {"name": section} if isinstance(section, str) else section


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Read ``a.b=VALUE`` words, VALUE as TOML or else as a string; the last word for a field wins.

    Raises:
        RecipeError: a word is not of that form.
    """
    changes: dict[str, Any] = {}
    for word in words:
        field, equals, text = word.partition("=")
        first, *rest = field.split(".")
        fits = first.isidentifier() and all(part.isidentifier() or part.isdecimal() for part in rest)
        if not equals or not fits:
            raise RecipeError(f"{word!r}: expected FIELD=VALUE, as in optimizer.lr=0.001")
        changes[field] = parse_value(text)
    return changes


def parse_value(text: str) -> Any:
    """Read `text` as a TOML value, or else return it as it is."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
