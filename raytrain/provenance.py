"""Provenance of recipes: code named by another person's recipe runs only with the user's consent."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raytrain.errors import RecipeError
from raytrain.files import write_atomic
from raytrain.registry import TARGET

MARKER = ".fetched"
"""File beside the recipe of a fetched run. It cannot be fetched itself, as hidden files never are."""


def mark_fetched(folder: Path, origin: str) -> None:
    """Mark a run's folder as fetched.

    Args:
        folder: the run's.
        origin: the source, for messages.
    """
    write_atomic(folder / MARKER, f"{origin}\n".encode())


def check_trusted(raw: Mapping[str, Any], file: Path) -> None:
    """Refuse a recipe that names code and lies in a fetched run.

    Args:
        raw: the recipe's data.
        file: the recipe's file.

    Raises:
        RecipeError: it names code.
    """
    for folder in file.resolve().parents:  # a run may contain others, as a search its trials
        if (marker := folder / MARKER).is_file():
            refuse_code(raw, f"{folder} was fetched from {marker.read_text().strip()}")


def refuse_code(raw: Mapping[str, Any], whose: str) -> None:
    """Refuse data of another person that names code.

    Args:
        raw: nested plain data of a recipe.
        whose: the beginning of the error message, about its origin.

    Raises:
        RecipeError: it names code.
    """
    if found := dict(find_code(raw)):
        named = "; ".join(f"{field} names {value}" for field, value in found.items())
        raise RecipeError(f"{whose}, and its recipe is code: {named}. Read that, and add --trust to run it")


def find_code(raw: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted field, value) for each value of the form "module:attribute" in nested plain data."""
    if isinstance(raw, str) and re.fullmatch(TARGET, raw):
        yield field, raw
    inside: Mapping[Any, Any] = raw if isinstance(raw, Mapping) else {}
    inside = dict(enumerate(raw)) if isinstance(raw, list | tuple) else inside
    for key, value in inside.items():
        yield from find_code(value, f"{field}.{key}" if field else str(key))
