"""Registries: plain tables of ``short name -> "module:attribute"``, imported when a name is used.

A description may follow the target, ``"module:attribute Description."``, where the docstring of the object does not
serve as one. Contract tests run over these tables. A name with a colon is imported as it stands, so a user's own
classes and functions need no registration.
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
"""Pattern of "module:attribute"."""


def suggest(name: str, known: Iterable[str], meant: str = "") -> str:
    """Return the end of an error message: the names most similar to `name`, then all known ones.

    Args:
        name: that is not known.
        known: names.
        meant: the name to suggest in place of similar ones.

    >>> suggest("adm", ["adam", "sgd"])
    'did you mean adam? known: adam, sgd'
    """
    names = sorted(known)
    close = [meant] if meant else difflib.get_close_matches(name, names, n=2)
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{guess}known: {', '.join(names)}"


def error_location(error: BaseException) -> str:
    """Return where an error was raised, as " (mine.py, line 3)", or "" if that is not in code of the user."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    outside = isinstance(error, SyntaxError) or not frames or frames[-1].filename == importlib.__file__
    return "" if outside else f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def split_target(target: str, what: str) -> tuple[str, str]:
    """Split "module:attribute" into module and attribute.

    Args:
        target: the name.
        what: as in `resolve`.

    Raises:
        RecipeError: it has another form, or the module is in Python's standard library.
    """
    if not re.fullmatch(TARGET, target):
        raise RecipeError(f"{what}: expected module:attribute, as in mine:task; got {target!r}")
    module, _, attribute = target.partition(":")
    if (package := module.partition(".")[0]) in sys.stdlib_module_names:
        raise RecipeError(f"{what}: {package!r} is a module of Python itself; name one of yours; got {target!r}")
    return module, attribute


def resolve(table: Mapping[str, str], name: str, what: str) -> Any:
    """Import and return the object of a name.

    Args:
        table: short name -> "module:attribute".
        name: a short name of the table, or "module:attribute" itself.
        what: the recipe's field ("task.name"), with which error messages begin.

    Raises:
        RecipeError: the name is neither in the table nor a target, or its module or attribute cannot be imported.

    >>> resolve({"adamw": "torch.optim:AdamW"}, "adamw", "optimizer.name").__name__
    'AdamW'
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
    """Check that a name can be resolved, without importing what the table names.

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
    """Return a function that imports and calls the one at "module:attribute"."""

    def call(*arguments: Any) -> Any:
        return resolve({}, target, target)(*arguments)

    return call


def summary(table: Mapping[str, str], name: str) -> str:
    """Return a one-line description of a name, without importing the object if possible."""
    target, _, line = table[name].partition(" ")
    document = line or source_docstring(*split_target(target, name)) or resolve(table, name, name).__doc__ or ""
    return document.strip().partition("\n")[0]
