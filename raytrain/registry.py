"""Short names for things: plain tables of ``short name -> "module:attribute"``.

Where the docstring of what is named does not say it well, a line follows: ``"module:attribute what it is"``.

A table is data: it is the same in every process, it loads nothing until a name is used, and it is the list that the
contract tests run over. Any other value with a colon is imported as it stands, so what a user wrote needs no
registration.
"""

import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from raytrain.errors import RecipeError
from raytrain.modules import source_docstring

TARGET = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"
"""How "module:attribute" is written."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the known names nearest to `name`, then all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2)
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{guess}known: {', '.join(names)}"


def error_location(error: BaseException) -> str:
    """Return where in a file an error arose, as " (mine.py, line 3)", for the end of a message that names the error."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    outside = isinstance(error, SyntaxError) or not frames or frames[-1].filename == importlib.__file__
    return "" if outside else f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def split_target(target: str, what: str) -> tuple[str, str]:
    """Return the module and the attribute that "module:attribute" names.

    Args:
        target: the name.
        what: as in `resolve`.

    Raises:
        RecipeError: it is not of that form, or the module is one of Python's own, of which nothing is meant for us.
    """
    if not re.fullmatch(TARGET, target):
        raise RecipeError(f"{what}: expected module:attribute, as in mine:task; got {target!r}")
    module, _, attribute = target.partition(":")
    if (package := module.partition(".")[0]) in sys.stdlib_module_names:
        raise RecipeError(f"{what}: {package!r} is a module of Python itself; name one of yours; got {target!r}")
    return module, attribute


def resolve(table: Mapping[str, str], name: str, what: str) -> Any:
    """Return the object that `name` stands for.

    Args:
        table: short name -> "module:attribute".
        name: a short name of the table, or "module:attribute" itself.
        what: what the name is for, as the user wrote it ("task.name"); it begins the error message.

    Raises:
        RecipeError: the name is not in the table and not a place, or its module or attribute cannot be imported.
    """
    if table and ":" not in name and name not in table:
        raise RecipeError(f"{what}: no such name {name!r}; {suggest(name, table)}, or your own as module:attribute")
    module_name, attribute = split_target(table[name].partition(" ")[0] if name in table else name, what)
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"{what}: cannot import {module_name!r}: {type(error).__name__}: {error}{error_location(error)}"
        ) from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            public = [key for key in dir(found) if not key.startswith("_")]
            raise RecipeError(f"{what}: {module_name!r} has no {attribute!r}; {suggest(part, public)}") from None
    return found


def check_known(table: Mapping[str, str], name: str, what: str) -> None:
    """Check that `name` stands for something; what the table names is not imported for that.

    Args:
        table: as in `resolve`.
        name: as in `resolve`.
        what: as in `resolve`.

    Raises:
        RecipeError: as `resolve`.
    """
    if name not in table:
        resolve(table, name, what)


def lazy(target: str) -> Callable[..., Any]:
    """Return a function that imports the one at "module:attribute" when it is called, and calls it."""

    def call(*arguments: Any) -> Any:
        return resolve({}, target, target)(*arguments)

    return call


def summary(table: Mapping[str, str], name: str) -> str:
    """Return in one line what a name of a table stands for; it is imported only if its source does not tell."""
    target, _, line = table[name].partition(" ")
    document = line or source_docstring(*split_target(target, name)) or resolve(table, name, name).__doc__ or ""
    return document.strip().partition("\n")[0]
