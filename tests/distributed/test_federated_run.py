"""Federated runs on Ray: equal to the simulation in plain Python, to the bit, whatever happens to the processes."""

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
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


def pids_of(grid: RayGrid) -> list[int]:
    import ray

    actors = [thread._actor for thread in grid._pool._threads]
    return ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors])


def kill_when_serving(pid: int) -> threading.Thread:
    """Kill an actor while it serves clients, which Ray writes into the title of its process."""

    def kill() -> None:
        process = psutil.Process(pid)
        while "ClientActor.serve" not in "".join(process.cmdline()):
            time.sleep(0.001)
        process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_an_actor_that_is_killed_in_a_round_changes_nothing(ray_cluster: None, tmp_path: Path) -> None:
    recipe = recipe_of(**{"protocol.local_steps": 100, "rounds": 3})
    federation, said = Federation.of(recipe), list[str]()
    server = federation.server()
    with RayGrid(
        partial(load_clients, recipe.plain(), server.model), 12, ActorOptions(2, 0.5), say=said.append
    ) as grid:
        killers = [kill_when_serving(pid) for pid in pids_of(grid)]
        rounds = list(federation.rounds(server, GridChannel(grid, grid.get_node_ids())).run(tmp_path / "run"))
    for killer in killers:
        killer.join()
    assert said == ["an actor died; starting another in its place"] * 2
    assert [len(done.heard) for done in rounds] == [5] * 3
    assert server.model.digest == in_process(recipe, tmp_path / "one").model.digest


def test_a_million_clients_are_registered_in_a_second(ray_cluster: None, tmp_path: Path) -> None:
    recipe = recipe_of(**{"clients.count": 1_000_000, "clients.per_round": 100, "protocol.local_steps": 2, "rounds": 1})
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    federation = Federation.of(recipe)
    server = federation.server()
    assert time.perf_counter() - began < 5, "about a second on an idle machine"
    assert psutil.Process().memory_info().rss - before < 64 << 20
    with RayGrid(partial(load_clients, recipe.plain(), server.model), 1_000_000, ActorOptions(2, 0.5)) as grid:
        (done,) = federation.rounds(server, GridChannel(grid, grid.get_node_ids())).run(tmp_path)
    assert len(done.heard) == 100
