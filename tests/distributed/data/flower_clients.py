"""Clients for `test_ray_grid.py`: those of Flower's strategies, and some that are hard to serve."""

import os
import time
from functools import cache
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod

from federated.build import Federation
from federated.flower.client import TrainingClient
from federated.flower.messages import MESSAGE_NAME
from federated.recipe import FederateRecipe

TREES = (
    b'{"learner": {"gradient_booster": {"model": {"gbtree_model_param": {"num_trees": "1", "num_parallel_tree": "1"},'
    b' "iteration_indptr": [0, 1], "trees": [{"id": 0}], "tree_info": [0]}}}}'
)
"""A model of XGBoost, as far as Flower reads it."""
SEEDS = {
    "kind": "federate",
    "task": "raytrain.testing:tiny",
    "rounds": 3,
    "seed": 5,
    "clients": {"count": 9, "per_round": 4},
    "optimizer": {"lr": 0.02},
    "protocol": {"pool": 64, "local_steps": 12, "batch": 4},
}
"""A recipe whose clients send numbers along seeds."""

with (Path(__file__).parent / "loaded.txt").open("a") as lines:  # the test has copied this file
    lines.write(f"{os.getpid()}\n")


@cache
def seed_clients() -> TrainingClient:
    return TrainingClient(Federation.of(FederateRecipe.parse(SEEDS)).trainer())


def train(message: Message, context: Context) -> Message:
    """Go a tenth of the way to the client's own point, or take local steps along seeds."""
    if MESSAGE_NAME in message.content:
        return seed_clients()(message, context)
    client = context.node_config["partition-id"]
    arrays = message.content["arrays"].to_numpy_ndarrays()
    if arrays[0].dtype == np.uint8:
        moved = [np.frombuffer(TREES, np.uint8)]
    else:
        moved = [array + 0.1 * (np.sin(1.7 * client + np.arange(array.size)) - array) for array in arrays]
    loss = 0.0 if arrays[0].dtype == np.uint8 else float(sum(np.square(array).sum() for array in moved))
    metrics = MetricRecord({"num-examples": 3 + client % 4, "train_loss": loss, "partition": client})
    return Message(RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message)


apps = {
    "none": ClientApp(),
    "fixed": ClientApp(mods=[fixedclipping_mod]),
    "adaptive": ClientApp(mods=[adaptiveclipping_mod]),
}
for each in apps.values():
    each.train()(train)
app = apps["none"]


def client(message: Message, context: Context) -> Message:
    """Be the client whose mods the server asks for."""
    config = message.content.config_records.get("config", {})
    return apps[config.get("mods", "none")](message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"].to_numpy_ndarrays()
    metrics = MetricRecord({"num-examples": 2, "sum": float(sum(array.sum() for array in arrays))})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def tell(message: Message, **values: int | float | list[int]) -> Message:
    return Message(RecordDict({"answer": MetricRecord(values)}), reply_to=message)


@app.query("who")
def who(message: Message, context: Context) -> Message:
    return tell(message, partition=context.node_config["partition-id"], pid=os.getpid())


@app.query("config")
def config(message: Message, context: Context) -> Message:
    context.run_config["shots"] += 1  # the client's own
    answer = ConfigRecord({**context.node_config, **context.run_config, "node": context.node_id})
    return Message(RecordDict({"answer": answer}), reply_to=message)


@app.query("spoil")
def spoil(message: Message, context: Context) -> Message:
    """Say what is there, and leave nothing of it as it was."""
    config, seen = message.content["config"], message.content["config"]["list"]
    size = len(message.content) + len(message.content["arrays"])
    reply = tell(message, seen=list(seen), number=config["number"], size=size)
    seen.append(5)
    config["number"] = -1
    del message.content["arrays"]["0"], message.content["arrays"]
    message.content["more"] = ConfigRecord()
    return reply


@app.query("visits")
def visits(message: Message, context: Context) -> Message:
    """Count the visits in the context; client 0 does not, and client 3 has one that fails."""
    client = context.node_config["partition-id"]
    counter = context.state.setdefault("counter", MetricRecord({"visits": 0}))
    counter["visits"] += 1
    if client == 3 and counter["visits"] == 2:
        raise KeyError("state")
    if client == 0:
        context.state.clear()
    return tell(message, visits=counter["visits"], pid=os.getpid())


reused = RecordDict({"answer": MetricRecord()})


@app.query("reuse")
def reuse(message: Message, context: Context) -> Message:
    """Use one record for all replies."""
    reused["answer"]["partition"] = context.node_config["partition-id"]
    return Message(reused, reply_to=message)


@app.query("fail")
def fail(message: Message, context: Context) -> Message:
    client = context.node_config["partition-id"]
    if client == 1:
        raise ValueError("no data\nfor this client")
    if client == 2:
        raise SystemExit(3)
    return None if client == 3 else tell(message, partition=client)


@app.query("sleep")
def sleep(message: Message, context: Context) -> Message:
    """Note the process, and sleep as long as it is said for this client."""
    client = context.node_config["partition-id"]
    note = Path(message.content["config"]["folder"]) / str(client)
    note.write_text(str(os.getpid()))
    time.sleep(message.content["config"]["seconds"][client])
    return tell(message, partition=client, pid=os.getpid())
