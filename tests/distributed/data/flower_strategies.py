"""Flower's strategies, all in one `ServerApp`, for `test_ray_grid.py`.

    python flower_strategies.py RESULTS.json

runs some of them on Flower's own simulation, and writes what they lead to.
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from flower_clients import SEEDS, TREES, client
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp, strategy
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.simulation import run_simulation

from federated.flower.seed_run import SeedRun
from federated.flower.seeding import global_seed
from federated.flower.testing import InProcessGrid
from federated.recipe import FederateRecipe
from federated.rounds import REPORTS

CLIENTS = 9
ROUNDS = 2
ALL = {"min_available_nodes": CLIENTS, "fraction_evaluate": 0.0}
DP = {"noise_multiplier": 0.1, "num_sampled_clients": CLIENTS}
WRAPPERS = {
    "DifferentialPrivacyServerSideFixedClipping": {"clipping_norm": 0.3},
    "DifferentialPrivacyServerSideAdaptiveClipping": {},
    "DifferentialPrivacyClientSideFixedClipping": {"clipping_norm": 0.3},
    "DifferentialPrivacyClientSideAdaptiveClipping": {},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "FedAvg": {"fraction_evaluate": 1.0},
    "FedProx": {"proximal_mu": 0.1},
    "FedAdam": {},
    "FedYogi": {},
    "FedAdagrad": {},
    "FedAvgM": {"server_momentum": 0.5},
    "FedMedian": {},
    "FedTrimmedAvg": {},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
    "QFedAvg": {"client_learning_rate": 0.1},
    "FedXgbBagging": {},
    "FedXgbCyclic": {},
}
NAMES = [*OPTIONS, *WRAPPERS]
ON_FLOWERS_OWN = ["FedAvg", "FedAdam", "Krum", "DifferentialPrivacyClientSideFixedClipping"]


def strategy_of(name: str) -> Strategy:
    if name in WRAPPERS:
        return getattr(strategy, name)(FedAvg(**ALL), **DP, **WRAPPERS[name])
    return getattr(strategy, name)(**{**ALL, **OPTIONS[name]})


def mods_of(name: str) -> str:
    return "none" if "ClientSide" not in name else "fixed" if "Fixed" in name else "adaptive"


def follow(name: str, grid: Grid) -> dict[str, Any]:
    """Return what a strategy leads to."""
    arrays = [np.frombuffer(TREES, np.uint8)] if "Xgb" in name else [np.zeros(4), np.ones(2)]
    with global_seed(7):
        return outcome(strategy_of(name), ArrayRecord(arrays), grid, mods_of(name))


def outcome(way: Strategy, arrays: ArrayRecord, grid: Grid, mods: str = "none") -> dict[str, Any]:
    config = ConfigRecord({"mods": mods})
    result = way.start(grid, arrays, num_rounds=ROUNDS, train_config=config, evaluate_config=ConfigRecord())
    return {
        "arrays": [array.tolist() for array in result.arrays.to_numpy_ndarrays()],
        "trained": [dict(record) for record in result.train_metrics_clientapp.values()],
        "evaluated": [dict(record) for record in result.evaluate_metrics_clientapp.values()],
    }


def add_up_by_partition(grid: Grid) -> list[Any]:
    """Return the mean of clients, which are known and added up by their partition, after some rounds."""
    nodes = list(grid.get_node_ids())
    replies = ask(grid, "query.who", nodes, RecordDict())
    node_of = {reply.content["answer"]["partition"]: reply.metadata.src_node_id for reply in replies}
    arrays = ArrayRecord([np.zeros(4), np.ones(2)])
    for number in range(3):
        some = [node_of[partition] for partition in sorted(node_of) if partition % 3 != number]
        replies = ask(grid, "train", some, RecordDict({"arrays": arrays, "config": ConfigRecord()}))
        replies.sort(key=lambda reply: reply.content["metrics"]["partition"])
        found = [reply.content["arrays"].to_numpy_ndarrays() for reply in replies]
        arrays = ArrayRecord([sum(each) / len(found) for each in zip(*found, strict=True)])
    return [array.tolist() for array in arrays.to_numpy_ndarrays()]


def seeds_by_partition(grid: Grid) -> str:
    """Return the reports of a federated run with numbers along seeds."""
    replies = ask(grid, "query.who", list(grid.get_node_ids()), RecordDict())
    node_of = {reply.content["answer"]["partition"]: reply.metadata.src_node_id for reply in replies}
    with tempfile.TemporaryDirectory() as folder:
        run = SeedRun(FederateRecipe.parse(SEEDS))
        for _ in run.play(grid, [node_of[client] for client in range(CLIENTS)], Path(folder), lambda done: None):
            pass
        return (Path(folder) / REPORTS).read_bytes().hex()


def ask(grid: Grid, kind: str, nodes: Iterable[int], content: RecordDict) -> list[Message]:
    return list(grid.send_and_receive([Message(content, dst_node_id=node, message_type=kind) for node in nodes]))


def in_this_process() -> InProcessGrid:
    """Return a grid that calls clients one after the other; each has a copy of its message, as over a network."""
    return InProcessGrid(lambda message, context: client(deepcopy(message), context), CLIENTS)


def main(write: Callable[[str], Any]) -> None:
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        results = {name: follow(name, grid) for name in ON_FLOWERS_OWN}
        write(json.dumps({**results, "by partition": add_up_by_partition(grid), "seeds": seeds_by_partition(grid)}))

    resources = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 2}}
    try:
        run_simulation(server, client, CLIENTS, backend_config=resources)
    except RuntimeError:
        traceback.print_exc()
        os._exit(1)  # past the thread of the server, which waits for clients for ever


if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    main(Path(sys.argv[1]).write_text)
