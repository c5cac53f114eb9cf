"""The grid of a user's Flower app: a `RayGrid` that shows each exchange, with faults on purpose."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from flwr.app import Error, Message
from flwr.app.user_config import UserConfig
from flwr.common.constant import ErrorCode

from federated.faults import ClientFaultPlan
from federated.flower.channel import SEND_ATTEMPTS
from federated.flower.identity import FIRST_NODE
from federated.launch.actor_pool import ActorOptions
from federated.launch.client_actor import ClientFactory
from federated.launch.ray_grid import RayGrid
from raytrain.terminal import printable_line

SHOWN_ERRORS = 3
"""Of an exchange."""
CRASH = "crash"


@dataclass
class Exchange:
    """Messages to clients and what came back.

    Attributes:
        number: of the exchange, from 0.
        group: names an exchange of several calls; "": it is one call.
        sent: the messages.
        replies: those that came in time.
        began: when, in seconds of the monotonic clock.
        seconds: until the last call returned.
    """

    number: int
    group: str
    sent: list[Message] = field(default_factory=list)
    replies: list[Message] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def add(self, sent: Sequence[Message], replies: Sequence[Message]) -> None:
        """Add what a call has sent and heard."""
        self.sent += sent
        self.replies += replies
        self.seconds = time.monotonic() - self.began

    def line(self) -> str:
        """Return what to show of it."""
        errors = [printable_line(reply.error.reason or "")[:200] for reply in self.replies if reply.has_error()]
        heard, kind = len(self.replies) - len(errors), self.sent[0].metadata.message_type
        shown = [
            *errors[:SHOWN_ERRORS],
            *([f"{len(errors) - SHOWN_ERRORS} more"] if len(errors) > SHOWN_ERRORS else []),
        ]
        counts = f"heard {heard} of {len(self.sent)}"
        return "  ".join([f"exchange {self.number + 1}: {kind}", counts, f"{self.seconds:.1f} s", *shown])


class AppGrid(RayGrid):
    """Shows what `send_and_receive` did, and has the faults of a plan happen in it.

    A client with a fault is answered for with an error, as Flower does for one that is gone. Those whose process died
    because of another one are asked again, so who is heard does not depend on the moment of its death.

    Args:
        client, clients, actors, run_config: as of `RayGrid`.
        plan: of the faults; its rounds are exchanges, counted from 0.
        say: shows the user a line.
    """

    def __init__(
        self,
        client: ClientFactory,
        clients: int,
        actors: ActorOptions | None,
        run_config: UserConfig,
        *,
        plan: ClientFaultPlan,
        stopped: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(client, clients, actors, run_config, stopped=stopped, say=say)
        self._plan, self._tell = plan, say
        self._lock = threading.Lock()  # of what follows: apps in Flower's older form send from several threads
        self._exchanges, self._open = count(), Exchange(0, "")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages, and return the replies in the order of the messages; see `RayGrid`."""
        sent = list(messages)
        if not sent:
            return []
        exchange = self._exchange_of(sent[0])
        limits = [limit for limit in (timeout, self._plan.faults.timeout_seconds) if limit]
        replies = self._exchange(exchange.number, sent, min(limits, default=None))
        found = [replies[node] for node in (message.metadata.dst_node_id for message in sent) if node in replies]
        with self._lock:
            exchange.add(sent, found)
            if not exchange.group:
                self._tell(exchange.line())
        return found

    def close(self) -> None:
        """Show the last exchange, and end the actors."""
        self._tell_open()
        super().close()

    def _exchange_of(self, message: Message) -> Exchange:
        """Return the exchange of a message.

        Apps in Flower's older form send each message of a round by itself, and name the round as their group.
        """
        group = f"{message.metadata.message_type} {message.metadata.group_id}" if message.metadata.group_id else ""
        with self._lock:
            if not group or group != self._open.group:
                self._tell_open()
                self._open = Exchange(next(self._exchanges), group)
            return self._open

    def _tell_open(self) -> None:
        """Show an exchange that consists of several calls, when the last one has returned."""
        if self._open.group and self._open.sent:
            self._tell(self._open.line())
            self._open = Exchange(0, "")

    def _exchange(self, number: int, sent: Sequence[Message], timeout: float | None) -> dict[int, Message]:
        """Return the reply of each node that has one in time."""
        faults = {message.metadata.dst_node_id: self._fault(number, message, timeout) for message in sent}
        for node, error in faults.items():
            if error and error.code == ErrorCode.CLIENT_APP_CRASHED:
                self.end_actor(node - FIRST_NODE)
        replies: dict[int, Message] = {}
        waiting = list(sent)
        for _ in range(SEND_ATTEMPTS):
            for reply in super().send_and_receive(waiting, timeout=timeout):
                replies[reply.metadata.src_node_id] = reply
            waiting = [message for message in waiting if _is_crashed(replies, message.metadata.dst_node_id)]
            if not waiting:
                break
        for message in sent:
            if error := faults[message.metadata.dst_node_id]:
                replies[message.metadata.dst_node_id] = Message(error, reply_to=message)
        return replies

    def _fault(self, number: int, message: Message, timeout: float | None) -> Error | None:
        """Return the error that a fault of the plan makes of a client's reply, if it has one."""
        client = message.metadata.dst_node_id - FIRST_NODE
        name = self._plan.fault(number, client)
        if name == CRASH:
            return Error(ErrorCode.CLIENT_APP_CRASHED, f"client {client}: its process was lost")
        late = self._plan.faults.slow_seconds
        if name == "slow" and (timeout is None or late <= timeout):
            return None
        reason = f"late by {late:g} s" if name == "slow" else "no answer"
        return Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, f"client {client}: {reason}") if name else None


def _is_crashed(replies: Mapping[int, Message], node: int) -> bool:
    reply = replies.get(node)
    return reply is not None and reply.has_error() and reply.error.code == ErrorCode.CLIENT_APP_CRASHED
