"""A channel over a Flower `Grid`: actors on Ray, or machines of a deployment."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from federated.channel import Answer, NoReport
from federated.encodings import PayloadError
from federated.flower.messages import bytes_of, content_of
from raytrain.terminal import plain

MAX_REASON_CHARACTERS = 300
ATTEMPTS = 3
"""How often a client is asked whose process died: another client may have been the cause."""


class GridChannel:
    """Sends payloads as Flower's messages.

    A process that dies takes with it what it held for all of its clients, so these are asked again: who is heard does
    not depend on the moment of its death.

    Args:
        grid: that reaches the clients.
        nodes: the node of each client.
        timeout_seconds: after which a round ends; 0: it waits for all.
        end_process: ends a process that may serve a client.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Sequence[int],
        timeout_seconds: float = 0.0,
        end_process: Callable[[int], None] = lambda client: None,  # noqa: ARG005
    ) -> None:
        self._grid, self._nodes = grid, nodes
        self._timeout_seconds = timeout_seconds
        self._end_process = end_process

    def ask(self, round_number: int, payloads: Mapping[int, bytes]) -> Iterator[tuple[int, Answer]]:
        """Yield what each client answers; one that answers with an error has no report."""
        waiting = dict(payloads)
        for attempt in range(ATTEMPTS):
            crashed = {}
            for client, reply in self._exchange(round_number, waiting).items():
                if reply is not None and _is_crash(reply) and attempt + 1 < ATTEMPTS:
                    crashed[client] = waiting[client]
                else:
                    yield client, self._answer(reply)
            waiting = crashed

    def lose_process(self, client: int) -> None:
        """End a process that may serve a client."""
        self._end_process(client)

    def _exchange(self, round_number: int, payloads: Mapping[int, bytes]) -> dict[int, Message | None]:
        """Send payloads, and return each client's reply, or None if it did not come in time."""
        contents: dict[bytes, RecordDict] = {}  # equal payloads are one content, which the grid then keeps once
        sent = [
            Message(
                contents.setdefault(payload, content_of(payload)),
                dst_node_id=self._nodes[client],
                message_type=MessageType.TRAIN,
                group_id=str(round_number),
            )
            for client, payload in payloads.items()
        ]
        replies = self._grid.send_and_receive(sent, timeout=self._timeout_seconds or None) if sent else []
        of_node = {reply.metadata.src_node_id: reply for reply in replies}
        return {client: of_node.get(self._nodes[client]) for client in payloads}

    def _answer(self, reply: Message | None) -> Answer:
        if reply is None:
            return NoReport(f"no answer within {self._timeout_seconds:g} s")
        if reply.has_error():
            return NoReport(plain(reply.error.reason or "")[:MAX_REASON_CHARACTERS])
        try:
            return bytes_of(reply.content)
        except PayloadError as error:
            return NoReport(plain(str(error)))


def _is_crash(reply: Message) -> bool:
    return reply.has_error() and reply.error.code == ErrorCode.CLIENT_APP_CRASHED
