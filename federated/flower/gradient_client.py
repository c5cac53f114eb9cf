"""The clients of a run whose messages are parameters, as Flower calls them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.constant import PARTITION_ID_KEY

from federated.gradients import GradientTrainer

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
