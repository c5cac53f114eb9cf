"""Every example in a docstring runs."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("raytrain", "search", "federated")
ELSEWHERE = {  # with names of the package, workers or a Ray cluster
    "raytrain.api": "tests/e2e/test_api.py",
    "search.study": "tests/unit/ground/test_front_doors.py",
    "federated.flower.strategies": "tests/unit/ground/test_front_doors.py",
    "federated.launch.ray_grid": "tests/distributed/test_ray_grid.py",
}


def modules() -> list[str]:
    files = sorted(
        file for package in PACKAGES for file in (ROOT / package).rglob("*.py") if ">>> " in file.read_text()
    )
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


@pytest.mark.parametrize("module", sorted({*modules()} - {*ELSEWHERE}))
def test_examples_in_docstrings_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert (result.failed, result.attempted > 0) == (0, True)


@pytest.mark.parametrize(("module", "file"), ELSEWHERE.items())
def test_those_that_need_more_run_elsewhere(module: str, file: str) -> None:
    assert module in modules()
    assert "doctest.DocTestRunner()" in (ROOT / file).read_text()
