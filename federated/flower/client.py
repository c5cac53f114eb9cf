"""The clients of a run whose messages are payloads and reports, as Flower calls them."""

from dataclasses import dataclass

from flwr.app import Context, Message
from flwr.common.constant import PARTITION_ID_KEY

from federated.client import LocalTrainer
from federated.flower.messages import bytes_of, content_of


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
