"""The clients of a run whose messages are parameters, as Flower calls them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.constant import PARTITION_ID_KEY

from federated.build import initial_module, partition_of, task_of
from federated.client import ClientData
from federated.gradients import GradientOptions, GradientTrainer
from federated.recipe import FederateRecipe
from raytrain.optim.optimizers import make_optimizer
from raytrain.optim.options import OPTIMIZERS
from raytrain.registry import resolve

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
"""Records of a message, as Flower's strategies name them."""
NumberT = TypeVar("NumberT", int, float)


@dataclass(frozen=True, slots=True)
class GradientClient:
    """Answers for whichever client a message is for; it has the signature of a `ClientApp`.

    Attributes:
        trainer: of all clients.
    """

    trainer: GradientTrainer

    def __call__(self, message: Message, context: Context) -> Message:
        """Return a client's parameters after its local steps."""
        arrays, config = message.content.array_records[ARRAYS], message.content.config_records[CONFIG]
        result = self.trainer.fit(
            int(context.node_config[PARTITION_ID_KEY]),
            _number(config, "server-round", int) - 1,
            {name: array.numpy() for name, array in arrays.items()},
            lr_ratio=_number(config, "lr-ratio", float),
            proximal_mu=_number(config, "proximal-mu", float),
        )
        trained = ArrayRecord({name: Array(value) for name, value in result.arrays.items()})
        metrics = MetricRecord({"num-examples": result.examples, "train_loss": result.loss})
        return Message(RecordDict({ARRAYS: trained, METRICS: metrics}), reply_to=message)


def _number(config: ConfigRecord, key: str, kind: Callable[[Any], NumberT]) -> NumberT:
    """Return a number of a message's configuration, 0 if it is not there."""
    return kind(config.get(key, 0))


def load_clients(recipe: Mapping[str, Any]) -> GradientClient:
    """Return the clients of a run, in a process that serves any number of them.

    Args:
        recipe: as `Recipe.plain` returns it.

    Raises:
        RecipeError: the recipe does not fit the data or the model.
    """
    parsed = FederateRecipe.parse(recipe)
    torch.set_num_threads(parsed.threads())
    task = task_of(parsed)
    module = initial_module(parsed, task).to(parsed.device())
    data = ClientData(task, task.data("train"), partition_of(parsed, task).indices)
    constructor = resolve(OPTIMIZERS, parsed.optimizer.name, "optimizer.name")
    if not isinstance(parsed.protocol, GradientOptions):
        raise TypeError(type(parsed.protocol))
    new_optimizer = partial(make_optimizer, constructor, parsed.optimizer, module)
    return GradientClient(GradientTrainer(parsed.protocol, module, data, new_optimizer, parsed.seed))
