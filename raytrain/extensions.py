"""Extension points: a recipe's fields that name a user's function or class, and its signature.

The signature is first read from the source, so that a recipe is checked without running the code that it names. The
imported object is checked again before it is called.
"""

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain.errors import RecipeError
from raytrain.modules import find_spec
from raytrain.registry import resolve, split_target, suggest


@dataclass(frozen=True, slots=True)
class ExtensionPoint:
    """A field of a recipe whose values name a callable.

    Attributes:
        field: the recipe's field, with which error messages begin.
        expected: description of the callable, for error messages.
        arguments: number of its positional arguments.
        methods: required methods, if it is a class.
    """

    field: str
    expected: str
    arguments: int
    methods: tuple[str, ...] = ()

    def check(self, table: Mapping[str, str], name: str) -> None:
        """Check the object of a name by its source; no code of a user is imported.

        Args:
            table: short name -> "module:attribute" of components that need no check.
            name: a name of the table, or "module:attribute".

        Raises:
            RecipeError: there is no such name, module or attribute, or its signature differs.
        """
        if name in table or ":" not in name:
            resolve(table, name, self.field)
            return
        module, attribute = split_target(name, self.field)
        if module in sys.modules:
            self.load(table, name)
            return
        first, _, rest = attribute.partition(".")
        defined = dict(_definitions(_source(module, self.field)))
        if first in defined:
            self._refuse(name, "" if rest else self._wrong_source(defined[first]))
        elif defined and not defined.keys() & {"*", "__getattr__"}:  # either may define any other name
            raise RecipeError(f"{self.field}: {module!r} has no {attribute!r}; {suggest(first, defined)}")

    def load(self, table: Mapping[str, str], name: str) -> Any:
        """Import, check and return the object of a name.

        Raises:
            RecipeError: as `check`, or it cannot be imported.
        """
        found = resolve(table, name, self.field)
        self._refuse(name, "" if name in table else self._wrong(found))
        return found

    def _refuse(self, name: str, wrong: str) -> None:
        if wrong:
            raise RecipeError(f"{self.field}: expected {self.expected}; got {name!r}, which {wrong}")

    def _wrong(self, found: Any) -> str:
        """Return how an imported object differs from the expectation, or ""."""
        if not callable(found):
            return "cannot be called"
        if self.methods and not inspect.isclass(found):
            return "is not a class"
        if missing := [name for name in self.methods if not callable(getattr(found, name, None))]:
            return f"has no {missing[0]}"
        try:
            signature = inspect.signature(found)
            signature.bind(*range(self.arguments))
        except ValueError:
            return "does not say what it takes"
        except TypeError:
            return f"takes ({', '.join(signature.parameters)})"
        return ""

    def _wrong_source(self, defined: ast.stmt | None) -> str:
        """Return how a definition differs from the expectation, or "" also where only an import could tell."""
        if isinstance(defined, ast.FunctionDef):
            return "is not a class" if self.methods else self._wrong_function(defined)
        if not isinstance(defined, ast.ClassDef) or defined.bases or defined.decorator_list:
            return ""
        inside = {each.name: each for each in defined.body if isinstance(each, ast.FunctionDef)}
        if missing := [name for name in self.methods if name not in inside]:
            return f"has no {missing[0]}"
        return self._wrong_function(inside["__init__"], bound=1) if "__init__" in inside else ""

    def _wrong_function(self, function: ast.FunctionDef, bound: int = 0) -> str:
        """Return how a function with `bound` bound parameters differs from the expectation, or ""."""
        given = function.args
        places = [*given.posonlyargs, *given.args][bound:]
        most = sys.maxsize if given.vararg else len(places)
        fits = len(places) - len(given.defaults) <= self.arguments <= most and None not in given.kw_defaults
        if fits or function.decorator_list:
            return ""
        everything = [*places, given.vararg, *given.kwonlyargs, given.kwarg]
        return f"takes ({', '.join(each.arg for each in everything if each)})"


CALLBACK = ExtensionPoint("callbacks", "a function of the replica, called after every step", arguments=1)


def _source(module: str, field: str) -> ast.Module:
    """Return the syntax tree of a module, empty if it is not written in Python.

    Raises:
        RecipeError: there is no such module, or its source has an error.
    """
    spec = find_spec(module)
    if spec is None:
        raise RecipeError(f"{field}: cannot import {module!r}: ModuleNotFoundError: No module named {module!r}")
    file = Path(spec.origin or "")
    if file.suffix != ".py":
        return ast.Module([], [])
    try:
        return ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError) as error:
        raise RecipeError(f"{field}: cannot import {module!r}: {type(error).__name__}: {error}") from error


def _definitions(tree: ast.AST) -> Iterator[tuple[str, ast.stmt | None]]:
    """Yield (name, its `def` or `class`, or None for another value) of each definition in a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, None
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0], None
        else:
            yield from _definitions(node)
