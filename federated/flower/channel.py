"""Messages to clients over a Flower `Grid`: actors on Ray, or machines of a deployment."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from federated.channel import ClientAnswer, LateAnswer, NoReport
from federated.encodings import PayloadError
from federated.flower.messages import bytes_of, content_of
from raytrain.terminal import printable

SHOWN_REASON_CHARACTERS = 300
SEND_ATTEMPTS = 3
"""How often a client is asked whose process died: another client may have been the cause."""


def nobody(client: int) -> None:
    """End no process that serves a client: those of a deployment are not ours to end."""


def nothing_late() -> Sequence[LateAnswer]:
    """Return no late answers: a deployment's SuperLink drops them."""
    return ()


class GridMessenger:
    """Sends contents to clients, and returns what they reply.

    A process that dies takes with it what it held for all of its clients, so these are asked again: who is heard does
    not depend on the moment of its death.

    Args:
        grid: that reaches the clients.
        nodes: the node of each client.
        timeout_seconds: after which a round ends; 0: it waits for all.
        end_process: ends a process that may serve a client.
        late_answers: returns what came after the end of a round, since it was last called.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Sequence[int],
        timeout_seconds: float = 0.0,
        end_process: Callable[[int], None] = nobody,
        late_answers: Callable[[], Sequence[LateAnswer]] = nothing_late,
    ) -> None:
        self.grid, self.nodes, self.end_process, self.late_answers = grid, nodes, end_process, late_answers
        self._timeout_seconds = timeout_seconds

    def ask(self, round_number: int, contents: Mapping[int, RecordDict]) -> Iterator[tuple[int, RecordDict | NoReport]]:
        """Yield what each client replies; one that replies with an error has no report."""
        waiting = dict(contents)
        for attempt in range(SEND_ATTEMPTS):
            crashed = {}
            for client, reply in self._exchange(round_number, waiting).items():
                if reply is not None and _is_crash(reply) and attempt + 1 < SEND_ATTEMPTS:
                    crashed[client] = waiting[client]
                else:
                    yield client, self._content(reply)
            waiting = crashed

    def _exchange(self, round_number: int, contents: Mapping[int, RecordDict]) -> dict[int, Message | None]:
        """Send contents, and return each client's reply, or None if it did not come in time."""
        sent = [
            Message(content, dst_node_id=self.nodes[client], message_type=MessageType.TRAIN, group_id=str(round_number))
            for client, content in contents.items()
        ]
        replies = self.grid.send_and_receive(sent, timeout=self._timeout_seconds or None) if sent else []
        of_node = {reply.metadata.src_node_id: reply for reply in replies}
        return {client: of_node.get(self.nodes[client]) for client in contents}

    def _content(self, reply: Message | None) -> RecordDict | NoReport:
        if reply is None:
            return NoReport(f"no answer within {self._timeout_seconds:g} s")
        if reply.has_error():
            return NoReport(printable(reply.error.reason or "")[:SHOWN_REASON_CHARACTERS])
        return reply.content


class GridChannel:
    """A channel for payloads over a grid.

    Args:
        messenger: over the grid.
    """

    def __init__(self, messenger: GridMessenger) -> None:
        self._messenger = messenger

    def ask(self, round_number: int, payloads: Mapping[int, bytes]) -> Iterator[tuple[int, ClientAnswer]]:
        """Yield what each client answers."""
        distinct: dict[bytes, RecordDict] = {}  # equal payloads are one content, which the grid then keeps once
        contents = {client: distinct.setdefault(payload, content_of(payload)) for client, payload in payloads.items()}
        for client, content in self._messenger.ask(round_number, contents):
            yield client, content if isinstance(content, NoReport) else _report_of(content)

    def late_answers(self) -> Sequence[LateAnswer]:
        """Return what came late."""
        return self._messenger.late_answers()

    def lose_process(self, client: int) -> None:
        """End a process that may serve a client."""
        self._messenger.end_process(client)


def _report_of(content: RecordDict) -> ClientAnswer:
    try:
        return bytes_of(content)
    except PayloadError as error:
        return NoReport(printable(str(error)))


def _is_crash(reply: Message) -> bool:
    return reply.has_error() and reply.error.code == ErrorCode.CLIENT_APP_CRASHED
