"""The public names of the packages: these and no others, imported when they are used, each with an example."""

import doctest
import importlib
import inspect
import resource
import subprocess
import sys

import pytest
import torch

PUBLIC = {
    "raytrain": {
        *("CheckpointError", "RaytrainError", "RecipeError", "TrainingError"),
        *("Examples", "Options", "Result", "Task"),
        *("evaluate", "federate", "load", "search", "train"),
        *("CO2", "DDP", "CoCoD", "DelayedAveraging", "DiLoCo", "LocalSGD", "SlowMo", "ZeroOrder"),
    },
    "search": {
        *("Space", "Study", "Trial", "PBTScheduler"),
        *("ASHA", "GP", "MCTS", "NARS", "PBT", "TPE"),
        *("Evolution", "Extrapolation", "Grid", "Hyperband", "Median", "Random", "Sobol"),
    },
    "federated": {
        *("CommonSeeds", "FedKSeed", "FedKSeedPro", "Sign"),
        *("ActorOptions", "FederateRecipe", "Federation", "InProcessGrid", "RayGrid", "make_partition"),
    },
}
EXAMPLES = [(package, name) for package in ("search", "federated") for name in sorted(PUBLIC[package] - {"RayGrid"})]
"""Those that need no cluster."""


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_these_and_each_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) == PUBLIC[package]
    assert all(getattr(module, name) for name in module.__all__)
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(ImportError, match="cannot import name 'trian'"):
        exec(f"from {package} import trian")


@pytest.mark.parametrize("package", PUBLIC)
def test_the_import_of_a_package_takes_no_time(package: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = f"import sys, {package}; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert {"torch", "ray", "flwr", "numpy", "pydantic"}.isdisjoint(imported)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize(("package", "name"), EXAMPLES)
def test_examples_in_docstrings_run(package: str, name: str) -> None:
    door = importlib.import_module(package)
    public = getattr(door, name)
    names = {"torch": torch, **vars(inspect.getmodule(public)), **{each: getattr(door, each) for each in door.__all__}}
    [example] = doctest.DocTestFinder(recurse=False).find(public, name, globs=names)
    result = doctest.DocTestRunner().run(example)
    assert (result.failed, result.attempted > 0) == (0, True)
