"""The `ClientApp` of a deployment: it serves the one client of its SuperNode.

A SuperNode says in `--node-config` which recipe it takes part in, with its own data and its own limits:

    flower-supernode ... --node-config 'partition-id=3 recipe="digits-fedkseed" set=""'
"""

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
    recipe = recipe_of(context.node_config)
    torch.set_num_threads(recipe.threads())
    if not recipe.seeded:
        return GradientClient(gradient_trainer_of(recipe))(message, context)
    trainer = _trainer(recipe)
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
    check_closed("flower-supernode", insecure=bool(context.node_config.get("insecure", False)))
    recipe = recipe_of(context.node_config)
    origin = _trainer(recipe).newest.origin if recipe.seeded else ""
    return Message(introduction(int(context.node_config[PARTITION_ID_KEY]), origin), reply_to=message)


def _trainer(recipe: FederateRecipe) -> LocalTrainer:
    return Federation.of(recipe, recipe.device()).trainer()


def _remember(trainer: LocalTrainer, context: Context) -> None:
    """Have the newest model that the client was sent: each message may start a new process."""
    record = context.state.config_records.get(MODEL_RECORD)
    if record is None:
        return
    version, data = record["version"], record["coefficients"]
    if isinstance(version, int) and isinstance(data, bytes):
        trainer.start_from(GlobalModel(trainer.newest.origin, np.frombuffer(data, "<f8").copy(), version))
