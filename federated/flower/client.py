"""The clients of a run, as Flower calls them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.common.constant import PARTITION_ID_KEY

from federated.build import Federation
from federated.client import LocalTrainer
from federated.flower.messages import bytes_of, content_of
from federated.global_model import GlobalModel
from federated.recipe import FederateRecipe


@dataclass(frozen=True, slots=True)
class TrainingClient:
    """Answers for whichever client a message is for; it has the signature of a `ClientApp`.

    Attributes:
        trainer: of all clients.
    """

    trainer: LocalTrainer

    def __call__(self, message: Message, context: Context) -> Message:
        """Return a client's report on a round.

        Raises:
            PayloadError: the message holds no payload.
        """
        client = int(context.node_config[PARTITION_ID_KEY])
        report = self.trainer.answer(client, bytes_of(message.content))
        return Message(content_of(report), reply_to=message)


def load_clients(recipe: Mapping[str, Any], model: GlobalModel) -> TrainingClient:
    """Return the clients of a run, in a process that serves any number of them.

    Args:
        recipe: as `Recipe.plain` returns it.
        model: the newest, which clients of a run that goes on have already.

    Raises:
        RecipeError: the recipe does not fit the data or the model, or the server has other first weights.
    """
    parsed = FederateRecipe.parse(recipe)
    torch.set_num_threads(parsed.threads())
    trainer = Federation.of(parsed, "cuda" if parsed.clients.gpus else "cpu").trainer()
    trainer.start_from(model)
    return TrainingClient(trainer)
