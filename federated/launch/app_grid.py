"""The grid of a user's Flower app: a `RayGrid` that shows each exchange, with faults on purpose."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        self._plan, self._tell, self._exchanges = plan, say, count()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages, and return the replies in the order of the messages; see `RayGrid`."""
        sent, number, began = list(messages), next(self._exchanges), time.monotonic()
        limits = [limit for limit in (timeout, self._plan.faults.timeout_seconds) if limit]
        replies = self._exchange(number, sent, min(limits, default=None))
        found = [replies[node] for node in (message.metadata.dst_node_id for message in sent) if node in replies]
        if sent:
            self._tell(_line(number, sent, found, time.monotonic() - began))
        return found

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


def _line(number: int, sent: Sequence[Message], replies: Sequence[Message], seconds: float) -> str:
    """Return what to show of an exchange."""
    errors = [printable_line(reply.error.reason or "")[:200] for reply in replies if reply.has_error()]
    heard, kind = len(replies) - len(errors), sent[0].metadata.message_type
    shown = [*errors[:SHOWN_ERRORS], *([f"{len(errors) - SHOWN_ERRORS} more"] if len(errors) > SHOWN_ERRORS else [])]
    return "  ".join([f"exchange {number + 1}: {kind}", f"heard {heard} of {len(sent)}", f"{seconds:.1f} s", *shown])
