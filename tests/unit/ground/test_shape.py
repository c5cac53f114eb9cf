"""The shape that the code keeps: what a reader can count on."""

import ast
import importlib
import statistics
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("raytrain", "search", "federated")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
KERNELS = "raytrain/seeds/kernels/"
"""Which take what the hardware asks for, and loop over it."""

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, FUNCTIONS):
                yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", node


def body_lines(function: ast.FunctionDef) -> int:
    """Return the lines of code of a function, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def depth(node: ast.AST) -> int:
    deepest = 0
    for child in ast.iter_child_nodes(node):
        inner = 0 if isinstance(child, FUNCTIONS) else depth(child)
        # An `elif` reads as one level, not as an `if` inside an `else`.
        elif_ = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deepest = max(deepest, inner + (isinstance(child, BLOCKS) and not elif_))
    return deepest


def test_files_fit_in_a_head() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 500} == {}
    assert statistics.median(lengths.values()) <= 150


def test_functions_fit_on_a_screen() -> None:
    assert {name: body_lines(node) for name, node in functions() if body_lines(node) > 50} == {}


def test_nesting_is_shallow() -> None:
    deep = {name: depth(node) for name, node in functions() if depth(node) > 3}
    assert [name for name in deep if not name.startswith(KERNELS)] == []


def test_functions_take_few_arguments() -> None:
    counts = {name: len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) for name, node in functions()}
    assert [name for name, count in counts.items() if count > 8 and not name.startswith(KERNELS)] == []


def test_shipped_code_raises_and_never_asserts() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


@pytest.mark.parametrize("package", ["federated"])
def test_imports_are_few_deep(package: str) -> None:
    """Below Ray, so that what a file rests on can be read in an hour."""
    graph = grimp.build_graph(package, exclude_type_checking_imports=True)

    @cache
    def chain(module: str) -> tuple[str, ...]:
        below = map(chain, sorted(graph.find_modules_directly_imported_by(module)))
        return (module, *max(below, key=len, default=()))

    deepest = max((chain(module) for module in graph.modules if f"{package}.launch" not in module), key=len)
    assert len(deepest) <= 9, " > ".join(deepest)


BY_VALUE = ROOT / "raytrain" / "by_value.py"
"""Which unpickles what its own process sent to a worker, and reads no file."""


def test_nothing_is_unpickled() -> None:
    found = [
        f"{file.relative_to(ROOT)}: {word}"
        for file in FILES
        if file != BY_VALUE
        for word in ("pickle", "torch.load(", "torch.save(", "marshal")
        if word in file.read_text().replace("no pickle", "").replace("unpickled", "").replace("without pickle", "")
    ]
    assert found == []


def imports_of(file: Path) -> set[str]:
    """Return the modules and names that a file imports at its top."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def test_search_is_read_in_few_steps() -> None:
    """From no module below launch does a chain of imports in the package lead through more than nine."""
    files = [file for file in FILES if file.is_relative_to(ROOT / "search") and "launch" not in file.parts]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    imports = {name: imports_of(file) & names.keys() for name, file in names.items()}

    @cache
    def chain(name: str) -> tuple[str, ...]:
        return (name, *max((chain(other) for other in imports[name]), key=len, default=()))

    assert [chain(name) for name in names if len(chain(name)) > 9] == []


def test_tests_are_not_packages() -> None:
    """A test folder named after a package, or an __init__.py, would be imported in its place."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    assert [path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name in PACKAGES] == []


def test_unit_tests_mirror_the_packages() -> None:
    """Those of search and federated are in a folder each, those of a folder of raytrain in one of its name."""
    folders = {path.name for path in (ROOT / "raytrain").iterdir() if path.is_dir()} | {"ground", "search", "federated"}
    assert {path.parent.name for path in (ROOT / "tests" / "unit").rglob("test_*.py")} <= folders


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_says_what_it_is(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        assert ast.get_docstring(ast.parse(file.read_text())), f"{file} has no docstring"


CONVENTIONS = {"logger", "KIND", "app"}
"""Names that each file that has one gives to the same thing."""
FRONT_DOOR = {"train", "evaluate", "ZeroOrder", "Trial", "FedKSeed", "FedKSeedPro", "CommonSeeds", "Sign"}
"""Names of the package itself whose short words a part below it has, too."""


def public_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a file defines for others: of functions, classes, constants and types."""
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_a_public_name_is_defined_once() -> None:
    """In all packages together, so that a name means one thing wherever it is read."""
    places = defaultdict(set)
    for file in (file for file in FILES if file.parent.name != "examples"):  # which are programs of their own
        for name in public_names(ast.parse(file.read_text())):
            places[name].add(str(file.relative_to(ROOT)))
    twice = {name: files for name, files in places.items() if len(files) > 1 and not name.startswith("_")}
    assert {name: files for name, files in twice.items() if name not in CONVENTIONS | FRONT_DOOR} == {}


def test_what_benchmarks_import_is_there() -> None:
    """They are not run by tests, and a name that has changed would be found out months later."""
    for file in sorted((ROOT / "tests" / "benchmark").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
                module = importlib.import_module(str(node.module))
                lacking = [
                    name.name
                    for name in node.names
                    if not hasattr(module, name.name) and not find_spec(f"{node.module}.{name.name}")
                ]
                assert lacking == [], f"{file.name}: {node.module}"
