"""Where a recipe trains."""

import subprocess
import sys

import pytest

from raytrain.launch.dispatch import needs_ray
from raytrain.launch.elastic import device_of
from raytrain.training.recipe import TrainRecipe


@pytest.mark.parametrize(
    ("source", "address", "expected"),
    [("local", None, False), ("local", "local", True), ("local", "auto", True), ("ray", None, True)],
)
def test_only_an_address_and_actors_need_ray(source: str, address: str | None, expected: bool) -> None:
    recipe = TrainRecipe.parse({"kind": "train", "task": {"name": "digits", "source": source}})
    assert needs_ray(recipe, address) == expected


@pytest.mark.parametrize(
    ("gpus", "devices"),
    [(0, ["cpu", "cpu", "cpu"]), (1, ["cuda:0", "cuda:1", "cuda:2"]), (2, ["cuda:0", "cuda:2", "cuda:4"])]
    + [(0.5, ["cuda:0", "cuda:0", "cuda:1"])],
)
def test_each_worker_of_a_machine_has_its_gpu(gpus: float, devices: list[str]) -> None:
    assert [str(device_of(rank, gpus)) for rank in range(3)] == devices


def test_training_on_this_machine_imports_no_ray() -> None:
    script = "import sys, raytrain.launch.dispatch, raytrain.launch.elastic; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in imported
    assert "ray" not in imported
