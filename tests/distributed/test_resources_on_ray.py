"""Workers on the machines that the recipe asks for."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytrain.errors import RecipeError
from raytrain.kinds import RunOptions
from raytrain.run.rows import read_jsonl
from raytrain.training.recipe import TrainRecipe

# `ray start` would give it an address that others can reach, where a cluster of our own is not.
MACHINE = """
import json
import signal
import sys
from ray._private.node import Node
from ray._private.parameter import RayParams
Node(RayParams(**json.loads(sys.argv[1])), head=False)
signal.pause()
"""


@pytest.fixture
def second_machine(ray_cluster: None) -> Iterator[str]:
    """A machine with things that the first one has not; what is yielded is its id."""
    import ray

    has = {"num_cpus": 2, "resources": {"fast": 2}, "labels": {"room": "west"}, "object_store_memory": 100_000_000}
    address = {"gcs_address": ray.get_runtime_context().gcs_address, "node_ip_address": "127.0.0.1"}
    command = [sys.executable, "-c", MACHINE, json.dumps({**has, **address})]
    machine = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + 60
        while not (found := [node for node in ray.nodes() if node["Alive"] and "fast" in node["Resources"]]):
            assert time.monotonic() < give_up, "the second machine did not come"
            time.sleep(0.2)
        yield found[0]["NodeID"]
    finally:
        machine.terminate()
        machine.wait()


def recipe(**resources: Any) -> TrainRecipe:
    return TrainRecipe.parse(
        {
            "kind": "train",
            "task": "where:task",
            "workers": 2,
            "steps": 2,
            "log": {"loggers": []},
            "callbacks": ["where:note"],
            "resources": resources,
        }
    )


def test_workers_go_where_the_recipe_says(second_machine: str, workplace: Path) -> None:
    from raytrain.launch.predict import predict_file
    from raytrain.launch.train import run_on_ray

    (workplace / "where.py").write_text(
        "import ray\nfrom dataclasses import replace\nfrom pathlib import Path\n"
        "from raytrain.testing import TinyOptions, tiny\n\n"
        "def here(module, examples):\n"
        "    return [ray.get_runtime_context().get_node_id() for _ in examples]\n\n"
        "def task(options: TinyOptions):\n"
        "    return replace(tiny(options), inputs=lambda path: [1, 2, 3], predict=here)\n\ndef note(replica):\n"
        f"    place = Path({str(workplace)!r}) / f'machine-{{replica.rank}}'\n"
        "    place.write_text(ray.get_runtime_context().get_node_id())\n"
    )
    asked = recipe(custom={"fast": 1}, labels={"room": "in(west, east)"})
    assert run_on_ray(asked, RunOptions(workplace / "run")).status == "done"
    assert [(workplace / f"machine-{rank}").read_text() for rank in range(2)] == [second_machine] * 2
    assert len(read_jsonl(workplace / "run" / "attempts.jsonl")) == 1
    predict_file(
        "raytrain.training.results:load_best", workplace / "run", {}, workplace / "in", workplace / "out", None
    )
    assert (workplace / "out").read_text().split() == [f'"{second_machine}"'] * 3
    with pytest.raises(RecipeError, match=r"^resources.custom.fast: 2 workers of 2 each do not fit on machines that"):
        run_on_ray(recipe(custom={"fast": 2}), RunOptions(workplace / "large"))
    with pytest.raises(RecipeError, match=r"^resources.labels: no machine has room=north; there are .*room=west"):
        run_on_ray(recipe(labels={"room": "north"}), RunOptions(workplace / "north"))
    assert not (workplace / "north").exists()
