"""Columns of a record by their role: text, label, domain, prompt, answer."""

import re
from typing import Any

from raytrain.data.readers import USUAL_COLUMNS
from raytrain.data.records import Record
from raytrain.errors import RecipeError
from raytrain.registry import suggest

MAX_LABEL_CHARACTERS = 64
"""Longer values are texts rather than labels."""

Label = int | str


def column_of(record: Record, role: str, given: str = "") -> str:
    """Return the name of the column with a role: the recipe's, or one with a usual name.

    In a table without names of columns, the text is the first and the label the last; a single column has any role.

    Raises:
        RecipeError: there is no such column.
    """
    if given in record.fields:
        return given
    if given and len(record.fields) > 1:
        raise RecipeError(f"task.{role}: {record.where}: there is no column {given!r}; {suggest(given, record.fields)}")
    if found := usual_column(record, role):
        return found
    places = list(record.fields)
    if len(places) == 1 and role != "label":
        return places[0]
    if places == [str(place) for place in range(1, len(places) + 1)] and len(places) > 1 and role in ("text", "label"):
        return places[0] if role == "text" else places[-1]
    raise RecipeError(
        f"task.{role}: {record.where}: no column is called {' or '.join(USUAL_COLUMNS[role])}; name one of: "
        f"{', '.join(places)}"
    )


def usual_column(record: Record, role: str) -> str | None:
    """Return the name of the column that has a usual name of a role, or None."""
    lower = {name.lower(): name for name in record.fields}
    return next((lower[name] for name in USUAL_COLUMNS[role] if name in lower), None)


def text_of(record: Record, role: str, given: str = "") -> str:
    """Return the text of a record in a role.

    Raises:
        RecipeError: there is no such column, or it is not a text.
    """
    name = column_of(record, role, given)
    value = record.fields[name]
    if not isinstance(value, str):
        raise RecipeError(f"task.{role}: {record.where}: expected text in column {name!r}; got {shorten(value)}")
    return _whole(value, record, role, name)


def label_of(record: Record, given: str = "") -> Label:
    """Return the label of a record: an integer if it is or looks like one, else a short text.

    Raises:
        RecipeError: there is no such column, or it is not a label.
    """
    name = column_of(record, "label", given)
    value = record.fields[name]
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        return int(value)
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    if isinstance(value, str) and 0 < len(value.strip()) <= MAX_LABEL_CHARACTERS:
        return _whole(value.strip(), record, "label", name)
    raise RecipeError(
        f"task.label: {record.where}: expected a label in column {name!r}, an integer or a few words; got "
        f"{shorten(value)}; name the column of the labels with task.label"
    )


def domain_of(record: Record, given: str) -> str:
    """Return the domain of a record: its value in the column `given`, or the stem of its file.

    Raises:
        RecipeError: there is no such column.
    """
    if not given:
        return record.source
    if given not in record.fields:
        raise RecipeError(f"task.domain: {record.where}: there is no column {given!r}; {suggest(given, record.fields)}")
    return str(record.fields[given])


def _whole(text: str, record: Record, role: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"task.{role}: {record.where}: the text in column {name!r} has half a character (a lone surrogate) at "
            f"{error.start}"
        ) from None
    return text


def shorten(value: Any) -> str:
    """Return the value for an error message, in at most 80 characters."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
