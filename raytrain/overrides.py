"""Overrides of a nested recipe: dotted field -> value, parsed from ``a.b=VALUE``."""

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from raytrain.errors import RecipeError


def apply_overrides(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a nested mapping with each dotted field of `changes` set.

    Entries of lists are counted from 0: "optimizer.groups.0.lr_scale".

    Raises:
        RecipeError: the parent of a field is neither a section nor a list, or the list has no such entry.

    >>> apply_overrides({"task": "digits", "steps": 10}, {"task.valid": 0.1})
    {'task': {'name': 'digits', 'valid': 0.1}, 'steps': 10}
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
    """Return the key of a part of a dotted field in a section or a list."""
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
    """Return a section as a table, also if only its name is given."""
    return {"name": section} if isinstance(section, str) else section


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Parse arguments ``a.b=VALUE``, VALUE as TOML or else as a string; the last one for a field wins.

    Raises:
        RecipeError: an argument has another form.
    """
    changes: dict[str, Any] = {}
    for word in words:
        field, equals, text = word.partition("=")
        first, *rest = field.split(".")
        fits = first.isidentifier() and all(_is_key(part) or part.isdecimal() for part in rest)
        if not equals or not fits:
            raise RecipeError(f"{word!r}: expected FIELD=VALUE, as in optimizer.lr=0.001")
        changes[field] = parse_value(text)
    return changes


def _is_key(part: str) -> bool:
    return part.replace("-", "_").isidentifier() and not part.startswith("-")


def parse_value(text: str) -> Any:
    """Parse a TOML value, or return the text itself if it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
