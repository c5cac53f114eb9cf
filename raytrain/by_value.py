"""Objects that a recipe is given by value, because no module that a worker could import defines them.

A recipe names code as "module:attribute". A class of a notebook or of a script has no such name; as an attribute of
this module it has one, in the process that defined it and in its workers.
"""

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cloudpickle

from raytrain.errors import RecipeError
from raytrain.modules import find_spec
from raytrain.provenance import find_code
from raytrain.recipe import Recipe

PREFIX = f"{__name__}:"

_objects: dict[str, Any] = {}


def __getattr__(name: str) -> Any:
    """Return an object by its name.

    Raises:
        RecipeError: this process was not given it.
    """
    if name.startswith("__"):
        raise AttributeError(name)
    if name not in _objects:
        raise RecipeError(
            f"{name}: it was defined in the notebook or script that started the run, and not in a file; give it again, "
            "as in load(run, task=mine), or define it in a file and name it as module:attribute"
        )
    return _objects[name]


def name_objects(data: Any) -> Any:
    """Return nested data of a recipe in which names take the place of objects: "module:attribute", or one of here."""
    taken: dict[str, Any] = {}
    named = _named(data, taken)
    _objects.update(taken)
    return named


def _named(value: Any, taken: dict[str, Any]) -> Any:
    """Return a value with names in place of objects; `taken` gets those without a module."""
    if isinstance(value, Mapping):
        return {key: _named(inner, taken) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_named(inner, taken) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if not callable(value) and not dataclasses.is_dataclass(value):
        return value
    return _importable_name(value) or PREFIX + _free_name(value, taken)


def _importable_name(value: Any) -> str:
    """Return "module:attribute" of an object that a worker can import, or ""."""
    for home in sorted(_homes(value)):
        module, spec = sys.modules.get(home), find_spec(home) if home != "__main__" else None
        if spec is None or module is None:
            continue
        names = [name for name, found in vars(module).items() if found is value]
        if names:
            return f"{home}:{names[0]}"
    return ""


def _homes(value: Any) -> set[str]:
    """Return the modules that may define an object: its own, or those of the functions in a record such as a task."""
    record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    parts = [getattr(value, field.name) for field in dataclasses.fields(value)] if record else [value]
    return {part.__module__ for part in parts if callable(part) and isinstance(part.__module__, str)}


def _free_name(value: Any, taken: dict[str, Any]) -> str:
    """Return a name for an object, and keep it under that name."""
    base = re.sub(r"\W+", "_", getattr(value, "__name__", type(value).__name__.lower())).strip("_")
    names: Iterator[str] = (f"{base}{number or ''}" for number in range(len(taken) + 1))
    name = next(name for name in names if taken.get(name, value) is value)
    taken[name] = value
    return name


def objects_of(recipe: Recipe) -> dict[str, str]:
    """Return field -> name of each object that a recipe was given by value."""
    named = find_code(recipe.to_dict())
    return {field: value.removeprefix(PREFIX) for field, value in named if value.startswith(PREFIX)}


def dump_objects(recipe: Recipe) -> bytes:
    """Return the objects of a recipe as bytes for its own workers; they are never written to a file.

    Raises:
        RecipeError: one cannot be sent to another process.
    """
    found = {name: __getattr__(name) for name in objects_of(recipe).values()}
    try:
        return cloudpickle.dumps(found) if found else b""
    except Exception as error:  # of any object
        raise RecipeError(
            f"{', '.join(objects_of(recipe))}: cannot be sent to the workers: {type(error).__name__}: {error}; define "
            "it in a file, and name it as module:attribute"
        ) from error


def load_objects(sent: bytes) -> None:
    """Take the objects that `dump_objects` returned in the process that started this one.

    Raises:
        RecipeError: they need a module that is not here.
    """
    try:
        _objects.update(cloudpickle.loads(sent) if sent else {})
    except Exception as error:  # of any object
        raise RecipeError(
            f"objects given by value cannot be made in a worker: {type(error).__name__}: {error}; define them in a "
            "file that workers can import"
        ) from error


def check_importable(recipe: Recipe, who: str) -> None:
    """Refuse objects by value, for processes that import what a recipe names.

    Args:
        recipe: to run.
        who: these processes, for the message.

    Raises:
        RecipeError: the recipe has one.
    """
    for field, name in objects_of(recipe).items():
        raise RecipeError(
            f"{field}: {name} is not in a module, from which {who} can import it; define it in a file, and name it as "
            f"module:attribute, as in mine:{name}"
        )
