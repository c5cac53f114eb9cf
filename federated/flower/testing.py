"""What tests and benchmarks import: a grid in one process."""

from collections.abc import Callable, Iterable

from flwr.app import Context, Message, RecordDict
from flwr.common.constant import PARTITION_ID_KEY

from federated.flower.identity import FIRST_NODE


class InProcessGrid:
    """Serves clients in this process, one after the other; client i is node i + FIRST_NODE.

    Args:
        client: the app of all clients.
    """

    def __init__(self, client: Callable[[Message, Context], Message]) -> None:
        self.client = client

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:  # noqa: ARG002
        """Return the replies to messages."""
        return [self.client(message, self._context(message.metadata.dst_node_id)) for message in messages]

    def _context(self, node: int) -> Context:
        return Context(1, node, {PARTITION_ID_KEY: node - FIRST_NODE}, RecordDict(), {})
