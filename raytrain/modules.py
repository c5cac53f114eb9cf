"""Modules found, and read from their source, without importing them."""

import ast
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path


def find_spec(module: str) -> ModuleSpec | None:
    """Return the spec of a module without importing its parents, unlike `importlib.util.find_spec`."""
    parent, _, _ = module.rpartition(".")
    outer = find_spec(parent) if parent else None
    if parent and (outer is None or outer.submodule_search_locations is None):
        return None
    path = outer.submodule_search_locations if outer else None
    found = (finder.find_spec(module, path) for finder in sys.meta_path)
    return next((spec for spec in found if spec), None)


def source_files(module: str) -> dict[str, Path]:
    """Return path inside a module -> source file, of the module and all its submodules, sorted."""
    spec = find_spec(module)
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    files = {file.relative_to(folder).as_posix(): file for folder in folders for file in folder.rglob("*.py")}
    if spec and not folders and spec.origin and spec.origin.endswith(".py"):
        files["."] = Path(spec.origin)
    return dict(sorted(files.items()))


def source_docstring(module: str, attribute: str) -> str:
    """Return the docstring of a class or function in a module's source, or ""."""
    inside: ast.AST | None = _tree(module)
    for name in attribute.split("."):
        named = [node for node in getattr(inside, "body", ()) if getattr(node, "name", None) == name]
        inside = named[-1] if named else None
    if not isinstance(inside, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return ""
    return ast.get_docstring(inside) or ""


@cache
def _tree(module: str) -> ast.AST | None:
    """Return the syntax tree of a module; None without a valid Python source."""
    spec = find_spec(module)
    file = Path(spec.origin or "") if spec else Path()
    if file.suffix != ".py":
        return None
    try:
        return ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError):
        return None
