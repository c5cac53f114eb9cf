"""The `ClientApp` of a deployment, where it serves the one client of its SuperNode, and of Flower's local simulation.

A SuperNode says in `--node-config` which recipe it takes part in, with its own data and its own limits:

    flower-supernode ... --node-config 'partition-id=3 recipe="digits-fedkseed" set=""'

The clients of a simulation have the recipe of `--run-config`, as the server has.
"""

import sys
from functools import lru_cache

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import PARTITION_ID_KEY

from federated.build import Federation, gradient_trainer_of
from federated.client import LocalTrainer
from federated.flower.client import TrainingClient
from federated.flower.deployed import WHO, introduction, recipe_of
from federated.flower.gradient_client import GradientClient
from federated.flower.guard import check_closed
from federated.global_model import GlobalModel
from federated.recipe import FederateRecipe

MODEL_RECORD = "model"
"""In a client's context: the newest model that it was sent."""

app = ClientApp()


@app.train()
def answer_train(message: Message, context: Context) -> Message:
    """Return what the client reports on a round."""
    named = _named(context)
    recipe = _recipe(*named)
    torch.set_num_threads(recipe.threads())
    if not recipe.seeded:
        return _gradient_client(*named)(message, context)
    trainer = _trainer(*named)
    _remember(trainer, context)
    reply = TrainingClient(trainer)(message, context)
    newest = trainer.newest
    coefficients = newest.coefficients.astype("<f8").tobytes()
    context.state[MODEL_RECORD] = ConfigRecord({"version": newest.version, "coefficients": coefficients})
    return reply


@app.query(WHO)
def who(message: Message, context: Context) -> Message:
    """Return the client's number, and the digest of what it begins with.

    Raises:
        RecipeError: its SuperNode is open to strangers, or its recipe is wrong.
    """
    if not _is_simulated():
        check_closed("flower-supernode", insecure=bool(context.node_config.get("insecure", False)))
    named = _named(context)
    seeded = _recipe(*named).seeded
    origin = _trainer(*named).newest.origin if seeded else _gradient_client(*named).trainer.origin
    return Message(introduction(int(context.node_config[PARTITION_ID_KEY]), origin), reply_to=message)


def _named(context: Context) -> tuple[str, str]:
    """Return the recipe's name and its changes: those of a SuperNode are its own, as the run's come by the network."""
    config = context.run_config if _is_simulated() else context.node_config
    return str(config["recipe"]), str(config.get("set", ""))


def _is_simulated() -> bool:
    """Return whether this process is an actor of Ray, as a local simulation has: no SuperNode starts one."""
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized() and ray.get_runtime_context().get_actor_id())


# A process of a simulation serves many clients.
@lru_cache(maxsize=1)
def _recipe(name: str, changes: str) -> FederateRecipe:
    return recipe_of({"recipe": name, "set": changes})


@lru_cache(maxsize=1)
def _trainer(name: str, changes: str) -> LocalTrainer:
    recipe = _recipe(name, changes)
    return Federation.of(recipe, recipe.device()).trainer()


@lru_cache(maxsize=1)
def _gradient_client(name: str, changes: str) -> GradientClient:
    return GradientClient(gradient_trainer_of(_recipe(name, changes)))


def _remember(trainer: LocalTrainer, context: Context) -> None:
    """Have the newest model that the client was sent: each message may start a new process."""
    record = context.state.config_records.get(MODEL_RECORD)
    if record is None:
        return
    version, data = record["version"], record["coefficients"]
    if isinstance(version, int) and isinstance(data, bytes):
        trainer.start_from(GlobalModel(trainer.newest.origin, np.frombuffer(data, "<f8").copy(), version))
