"""Federated runs on Ray: equal to the simulation in plain Python, to the bit, whatever happens to the processes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from federated.build import Federation
from federated.flower.channel import GridChannel
from federated.flower.client import load_clients
from federated.launch.actor_pool import ActorOptions
from federated.launch.ray_grid import RayGrid
from federated.recipe import FederateRecipe
from federated.server import Server

FIELDS: dict[str, Any] = {
    "kind": "federate",
    "task": "raytrain.testing:tiny",
    "clients": {"count": 12, "per_round": 5, "cpus": 0.5},
    "optimizer": {"lr": 0.02},
    "rounds": 5,
    "seed": 5,
    "protocol": {"pool": 64, "local_steps": 12, "batch": 4},
}


def recipe_of(**more: Any) -> FederateRecipe:
    return FederateRecipe.parse_with(FIELDS, more)


def on_grid(
    recipe: FederateRecipe, actors: int, folder: Path, hook: Callable[[int], None] = lambda number: None
) -> Server:
    federation = Federation.of(recipe)
    server = federation.server()
    options = ActorOptions(actors, cpus=recipe.clients.cpus)
    with RayGrid(partial(load_clients, recipe.plain(), server.model), 12, options) as grid:
        channel = GridChannel(grid, grid.get_node_ids(), recipe.faults.timeout_seconds, grid.end_actor)
        for done in federation.rounds(server, channel).run(folder):
            hook(done.number)
    return server


def in_process(recipe: FederateRecipe, folder: Path) -> Server:
    federation = Federation.of(recipe)
    server = federation.server()
    for _ in federation.simulation(server).run(folder):
        pass
    return server


FAULTY = {
    "faults.drop": 0.1,
    "faults.garble": 0.1,
    "faults.crash": 0.1,
    "faults.slow": 0.1,
    "faults.timeout_seconds": 50,
}


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_a_run_on_actors_is_the_run_in_one_process(ray_cluster: None, actors: int, tmp_path: Path) -> None:
    more = {"protocol.name": "fedkseed-pro"} if actors == 2 else FAULTY if actors == 3 else {}
    recipe = recipe_of(**more)
    wanted, found = in_process(recipe, tmp_path / "one"), on_grid(recipe, actors, tmp_path / "other")
    assert found.model.coefficients.any()
    assert found.model.digest == wanted.model.digest
    assert np.array_equal(found.versions, wanted.versions)
    assert (tmp_path / "one" / "reports.bin").read_bytes() == (tmp_path / "other" / "reports.bin").read_bytes()
