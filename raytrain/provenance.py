"""Where a recipe comes from: code that another person's recipe names is run only if the user says so."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raytrain.errors import RecipeError
from raytrain.files import write_atomic
from raytrain.registry import TARGET

MARKER = ".fetched"
"""A file beside the recipe of a run that was fetched. No list of files to fetch can name it: it begins with a dot."""


def mark_fetched(folder: Path, origin: str) -> None:
    """Note in a run's folder that it was fetched.

    Args:
        folder: the run's.
        origin: where from.
    """
    write_atomic(folder / MARKER, f"{origin}\n".encode())


def check_trusted(raw: Mapping[str, Any], file: Path) -> None:
    """Check that a recipe names no code, if it came with a run that was fetched.

    Args:
        raw: the recipe's data.
        file: that it was read from.

    Raises:
        RecipeError: it names some.
    """
    for folder in file.resolve().parents:  # a run may hold others, as a search holds its trials
        if (marker := folder / MARKER).is_file():
            refuse_code(raw, f"{folder} was fetched from {marker.read_text().strip()}")


def refuse_code(raw: Mapping[str, Any], whose: str) -> None:
    """Check that data of another person names no code.

    Args:
        raw: nested plain data of a recipe.
        whose: says in the error message that it is another person's.

    Raises:
        RecipeError: it names some.
    """
    if found := dict(find_code(raw)):
        named = "; ".join(f"{field} names {value}" for field, value in found.items())
        raise RecipeError(f"{whose}, and its recipe is code: {named}. Read that, and add --trust to run it")


def find_code(raw: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted field, "module:attribute") for all that may name code in nested plain data."""
    if isinstance(raw, str) and re.fullmatch(TARGET, raw):
        yield field, raw
    inside: Mapping[Any, Any] = raw if isinstance(raw, Mapping) else {}
    inside = dict(enumerate(raw)) if isinstance(raw, list | tuple) else inside
    for key, value in inside.items():
        yield from find_code(value, f"{field}.{key}" if field else str(key))
