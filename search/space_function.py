"""Functions as search spaces: loaded by name; errors name the line in the file of whoever wrote them."""

import inspect
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import search.chooser
from raytrain.errors import RecipeError
from raytrain.registry import resolve
from search.chooser import Chooser

SPACE_FIELD = "search.space"
ARGUMENT = "choose"

SpaceFunction = Callable[[Chooser], Mapping[str, Any]]
"""(chooser) -> dotted field of the recipe -> value."""


def load_space_function(source: str) -> SpaceFunction:
    """Return the function at "module:attribute", its errors as those of a recipe.

    Raises:
        RecipeError: there is no such function.
    """
    function = resolve({}, source, SPACE_FIELD) if ":" in source else None
    if not callable(function):
        raise RecipeError(f"{SPACE_FIELD}: expected a table, or a function as module:attribute; got {source!r}")

    def checked(choose: Chooser) -> Mapping[str, Any]:
        try:
            changes = function(choose)
        except RecipeError as error:
            raise RecipeError(f"{source}: {error}{_user_line(error)}") from error
        except Exception as error:
            raise RecipeError(f"{source}: {type(error).__name__}: {error}{_user_line(error)}") from error
        if not isinstance(changes, Mapping):
            raise RecipeError(f"{source}: expected a mapping of recipe fields to values; got {changes!r}")
        return changes

    return checked


def is_space_function(found: Any) -> bool:
    """Return whether an object is a function with one argument, called `choose` or annotated as a `Chooser`."""
    if not inspect.isfunction(found):
        return False
    parameters = list(inspect.signature(found).parameters.values())
    return len(parameters) == 1 and (parameters[0].name == ARGUMENT or parameters[0].annotation is Chooser)


def field_line(source: str, field: str) -> str:
    """Return the line that names a field, as " (mine.py, line 4)", or "" if the source has no such line."""
    function = inspect.unwrap(resolve({}, source, SPACE_FIELD))
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        return ""
    for number, line in enumerate(lines, first):
        if f'"{field}"' in line or f"'{field}'" in line:
            return f" ({Path(inspect.getfile(function)).name}, line {number})"
    return ""


def _user_line(error: BaseException) -> str:
    """Return where the user's code was when an error was raised, as " (mine.py, line 3)"."""
    ours = {__file__, search.chooser.__file__}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in ours]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
