"""Federated runs on Ray: equal to the simulation in plain Python, to the bit, whatever happens to the processes."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from flwr.app import Context, Message

from federated.build import Federation
from federated.flower.seed_run import SeedRun
from federated.flower.strategy_run import StrategyRun
from federated.launch.actor_pool import ActorOptions
from federated.launch.ray_grid import RayGrid
from federated.recipe import FederateRecipe
from federated.records import row_of
from federated.sampling import participants
from federated.server import CommunicationRound, Server
from federated.tables import STRATEGIES
from raytrain.tensors import tensor_digest as digest

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


Run = SeedRun | StrategyRun


def play(run: Run, actors: int, folder: Path, said: list[str] | None = None) -> list[CommunicationRound]:
    """Play a run to its end on actors."""
    options, clients = ActorOptions(actors, cpus=0.5), run.partition.clients
    with RayGrid(run.client_factory(), clients, options, say=(said or []).append) as grid:
        return list(run.play(grid, grid.get_node_ids(), folder, lambda done: None, grid.end_actor))


def in_process(recipe: FederateRecipe, folder: Path) -> Server:
    federation = Federation.of(recipe)
    server = federation.server()
    for _ in federation.simulation(server).run(folder):
        pass
    return server


FAULTY = {
    "faults.drop": 0.1,
    "faults.garble": 0.1,
    "faults.crash": 0.03,
    "faults.slow": 0.1,
    "faults.slow_seconds": 400,
    "faults.timeout_seconds": 300,
}


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_a_run_on_actors_is_the_run_in_one_process(ray_cluster: None, actors: int, tmp_path: Path) -> None:
    more = {"protocol.name": "fedkseed-pro"} if actors == 2 else FAULTY if actors == 3 else {}
    recipe = recipe_of(**more)
    wanted, run = in_process(recipe, tmp_path / "one"), SeedRun(recipe)
    rounds, found = play(run, actors, tmp_path / "other"), run.server
    reasons = {reason for done in rounds for reason in done.missing.values()}
    assert reasons == ({"no answer", "late by 400 s", "its process was lost"} if actors == 3 else set())
    assert sum(done.refused for done in rounds) == (2 if actors == 3 else 0)
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
    run, said = SeedRun(recipe), list[str]()
    with RayGrid(run.client_factory(), 12, ActorOptions(2, 0.5), say=said.append) as grid:
        killer = kill_when_serving(pids_of(grid)[0])
        rounds = list(run.play(grid, grid.get_node_ids(), tmp_path / "run", lambda done: None, grid.end_actor))
    killer.join()
    assert said == ["an actor died; starting another in its place"]
    assert [len(done.heard) for done in rounds] == [5] * 3
    assert run.server.model.digest == in_process(recipe, tmp_path / "one").model.digest


def test_who_answers_after_the_end_of_a_round_is_named_and_not_used(ray_cluster: None, tmp_path: Path) -> None:
    run = SeedRun(recipe_of(**{"rounds": 2, "faults.timeout_seconds": 3}))
    slow, load = participants(5, 0, 12, 5).tolist()[2], run.client_factory()

    def load_with_a_slow_one() -> Callable[[Message, Context], Message]:
        answer = load()

        def client(message: Message, context: Context) -> Message:
            if (message.metadata.group_id, context.node_config["partition-id"]) == ("0", slow):
                time.sleep(5)
            return answer(message, context)

        return client

    with RayGrid(load_with_a_slow_one, 12, ActorOptions(2, 0.5)) as grid:
        recorded: list[dict[str, Any]] = []

        def record(done: CommunicationRound) -> None:
            recorded.append(row_of(done))
            give_up = time.monotonic() + 60
            while done.number == 0 and not grid._pool.outbox._late:
                assert time.monotonic() < give_up
                time.sleep(0.05)

        nodes = grid.get_node_ids()
        first, _ = run.play(grid, nodes, tmp_path, record, late_answers=grid.late_answers)
    assert first.missing[slow] == "no answer within 3 s"
    assert slow not in first.heard
    assert recorded[0]["late"] == []
    assert f"client {slow}, round 0: it answered after the end of the round" in recorded[1]["late"]


def test_a_million_clients_are_registered_in_a_second(ray_cluster: None, tmp_path: Path) -> None:
    recipe = recipe_of(**{"clients.count": 1_000_000, "clients.per_round": 100, "protocol.local_steps": 2, "rounds": 1})
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    run = SeedRun(recipe)
    assert time.perf_counter() - began < 5, "about a second on an idle machine"
    assert psutil.Process().memory_info().rss - before < 64 << 20
    (done,) = play(run, 2, tmp_path)
    assert len(done.heard) == 100


GRADIENTS: dict[str, Any] = {
    "protocol": {"name": "flower", "local_steps": 4, "batch": 4},
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "schedule": {"name": "linear"},
    "rounds": 4,
}
ARGUMENTS: dict[str, dict[str, float]] = {
    "FedProx": {"proximal_mu": 0.1},
    "FedTrimmedAvg": {"beta": 0.2},
    "QFedAvg": {"client_learning_rate": 0.05},
    "FedAvgM": {"server_momentum": 0.9},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 2},
    "FedAdam": {"eta": 0.01},
    "FedYogi": {"eta": 0.01},
    "FedAdagrad": {"eta": 0.01},
}


@pytest.fixture(scope="module")
def gradient_grid(ray_cluster: None) -> Iterator[RayGrid]:
    """Two actors whose clients send parameters; all strategies have the same clients."""
    run = StrategyRun(recipe_of(**GRADIENTS, **{"strategy.name": "FedAvg"}))
    with RayGrid(run.client_factory(), 12, ActorOptions(2, 0.5)) as grid:
        yield grid


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_learns_and_goes_on_as_if_nothing_had_happened(
    gradient_grid: RayGrid, name: str, tmp_path: Path
) -> None:
    recipe = recipe_of(**GRADIENTS, **{"strategy.name": name, "strategy.arguments": ARGUMENTS.get(name, {})})

    def rounds(run: StrategyRun, folder: Path) -> Iterator[CommunicationRound]:
        grid = gradient_grid
        return run.play(grid, grid.get_node_ids(), folder, lambda done: None, grid.end_actor)

    straight, killed, resumed = (StrategyRun(recipe) for _ in range(3))
    before = straight.evaluate()["loss"]
    done = list(rounds(straight, tmp_path / "straight"))
    assert [len(one.used) for one in done] == [5] * 4
    assert {one.bytes_down for one in done} == {one.bytes_up for one in done}, "the parameters, both ways"
    assert done[0].bytes_down > 5 * straight.parameter_bytes()
    assert straight.evaluate()["loss"] < before
    for _, __ in zip(range(2), rounds(killed, tmp_path / "killed"), strict=False):
        pass
    resumed.resume(tmp_path / "killed")
    assert resumed.version == 2
    list(rounds(resumed, tmp_path / "killed"))
    assert digest_of(straight) == digest_of(resumed)


def digest_of(run: StrategyRun) -> str:
    return digest((name, torch.from_numpy(value)) for name, value in run.arrays.items())
