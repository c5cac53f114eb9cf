"""What tests and benchmarks import: a grid in one process."""

from collections.abc import Callable, Iterable

from flwr.app import Context, Message, RecordDict
from flwr.common.constant import PARTITION_ID_KEY

from federated.flower.identity import FIRST_NODE, assume_identity


class InProcessGrid:
    """Serves clients in this process, one after the other; client i is node i + FIRST_NODE.

    Args:
        client: the app of all clients.
        clients: how many there are.

    >>> grid = InProcessGrid(lambda message, context: Message(message.content, reply_to=message), clients=3)
    >>> node = grid.get_node_ids()[2]
    >>> [reply] = grid.send_and_receive([Message(RecordDict(), dst_node_id=node, message_type="train")])
    >>> reply.has_error()
    False
    """

    def __init__(self, client: Callable[[Message, Context], Message], clients: int = 0) -> None:
        self.client = client
        self.clients = clients
        assume_identity(run_id=1)

    def get_node_ids(self) -> range:
        """Return the ids of the clients' nodes; that of client i is node i of them."""
        return range(FIRST_NODE, FIRST_NODE + self.clients)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:  # noqa: ARG002
        """Return the replies to messages."""
        return [self.client(message, self._context(message.metadata.dst_node_id)) for message in messages]

    def _context(self, node: int) -> Context:
        return Context(1, node, {PARTITION_ID_KEY: node - FIRST_NODE}, RecordDict(), {})
