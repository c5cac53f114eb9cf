"""The messages of a run on their way: waiting for an actor, held by one, answered, or given up."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from federated.flower.envelope import Fields, reply_to
from federated.flower.identity import FIRST_NODE
from federated.flower.records import FlatContent, restore
from federated.launch.client_actor import MAX_BATCH_SECONDS, MIN_BATCH_SECONDS, FlatAnswer, MessageBatch
from federated.launch.contents import Content

OUTBOX_POLL_SECONDS = 0.25
MOST_LATE = 10_000
"""Late answers that are known until they are collected: those of a user's app never are."""


@dataclass(slots=True, eq=False)
class Pending:
    """A message without a reply.

    Attributes:
        fields: of its metadata.
        content: its records.
        given_up_at: when its reply was no longer waited for, in seconds of `time.monotonic`; None: it still is.
    """

    fields: Fields
    content: Content
    given_up_at: float | None = None

    @property
    def id(self) -> str:
        """Return the message's id."""
        message_id: str = self.fields["_message_id"]
        return message_id

    @property
    def type(self) -> str:
        """Return the type of the message."""
        message_type: str = self.fields["_message_type"]
        return message_type

    @property
    def node(self) -> int:
        """Return the node of the client."""
        node: int = self.fields["_dst_node_id"]
        return node

    @property
    def group(self) -> str:
        """Return the group of the message: the number of its round."""
        group: str = self.fields["_group_id"]
        return group

    def expired(self, now: float) -> bool:
        """Return whether the message is no longer valid at a Unix time, in seconds."""
        expires: float = self.fields["_created_at"] + self.fields["_ttl"]
        return now > expires


class Outbox:
    """Deals messages to actors, and keeps the replies until they are collected. All threads may use it.

    A client is served by one actor at a time, in the order of its messages, so that what it leaves in its context is
    there for the next one.

    Args:
        actors: how many take messages.
    """

    def __init__(self, actors: int) -> None:
        self._actors = actors
        self._changed = threading.Condition()
        self._queue: deque[Pending] = deque()
        self._pending: dict[str, Pending] = {}
        self._replies: dict[str, Message] = {}
        self._late: deque[tuple[int, str]] = deque(maxlen=MOST_LATE)
        self._served: set[int] = set()  # the nodes whose clients an actor has now
        self._states: dict[int, FlatContent] = {}
        self.closed = False

    def post(self, messages: Sequence[Pending]) -> None:
        """Add messages, to be served in this order."""
        with self._changed:
            self._pending.update((message.id, message) for message in messages)
            self._queue.extend(messages)
            self._changed.notify_all()

    def take(self, paces: Mapping[str, float]) -> list[Pending]:
        """Return the next messages for an actor, as soon as there is one; none when the outbox is closed.

        Args:
            paces: type of message -> how many the actor serves in a second, as far as that is known.
        """
        with self._changed:
            while not self.closed:
                if batch := self._next(paces):
                    return batch
                self._changed.wait()
        return []

    def _next(self, paces: Mapping[str, float]) -> list[Pending]:
        """Return the first messages that are of one type, still wanted, and whose clients no other actor serves."""
        batch: list[Pending] = []
        aside: list[Pending] = []
        now, size, queued = time.time(), 1, len(self._queue)
        while self._queue and len(batch) < size and (not batch or self._queue[0].type == batch[0].type):
            message = self._queue.popleft()
            if self._wanted(message, now):
                (aside if message.node in self._served else batch).append(message)
            if len(batch) == 1:
                size = self._size(paces.get(batch[0].type, 0.0), queued)
        self._queue.extendleft(reversed(aside))
        self._served.update(message.node for message in batch)
        return batch

    def _size(self, pace: float, queued: int) -> int:
        """Return how many messages to hand to an actor at once.

        It is a share of the queue, and so shrinks with it, so that all actors end at about the same time (guided
        self-scheduling, Polychronopoulos and Kuck 1987). It is worth a call of the actor, and no more than a quarter of
        a second's work, so that few replies wait for others, and few are lost with an actor.

        Args:
            pace: how many messages the actor serves in a second; 0: not known.
            queued: how many messages wait.
        """
        share = -(-queued // (2 * self._actors))
        return min(max(share, int(pace * MIN_BATCH_SECONDS)), 1 + int(pace * MAX_BATCH_SECONDS))

    def _wanted(self, message: Pending, now: float) -> bool:
        """Return whether a message is still waited for and valid at a Unix time, in seconds."""
        if message.given_up_at is None and message.expired(now):
            self._expire(message, now)
        return message.given_up_at is None

    def batch_of(self, messages: Sequence[Pending]) -> MessageBatch:
        """Return messages as an actor gets them."""
        states = {message.node: self._states[message.node] for message in messages if message.node in self._states}
        return MessageBatch([message.fields for message in messages], [message.content for message in messages], states)

    def answer(
        self, messages: Sequence[Pending], answers: Sequence[FlatAnswer], states: dict[int, FlatContent]
    ) -> None:
        """Keep the answers to messages, unless nobody waits for them any longer.

        Args:
            messages: that an actor took.
            answers: to the first of them; the others go back to the head of the queue.
            states: node -> what its client has left in its context.
        """
        now, done = time.time(), len(answers)
        replies = {
            message.id: reply_to(message.fields, answer if isinstance(answer, Error) else restore(answer), now)
            for message, answer in zip(messages[:done], answers, strict=True)
        }
        with self._changed:
            self._late.extend(
                (message.node, message.group)
                for message, answer in zip(messages, answers, strict=False)
                if message.given_up_at is not None and not isinstance(answer, Error)
            )
            self._replies.update((key, reply) for key, reply in replies.items() if self._pending.pop(key, None))
            self._states.update(states)
            for node in [node for node, state in states.items() if not state]:
                del self._states[node]
            self._queue.extendleft(reversed(messages[done:]))
            self._served.difference_update(message.node for message in messages)
            self._changed.notify_all()

    def collect(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to messages as far as they are there, in the order of the messages, and forget them."""
        with self._changed:
            now = time.time()
            for message_id in (ids := list(message_ids)):
                if (message := self._pending.get(message_id)) and message.expired(now):
                    self._expire(message, now)
            return [self._replies.pop(message_id) for message_id in ids if message_id in self._replies]

    def collect_late(self) -> list[tuple[int, str]]:
        """Return (node, group) of messages that were answered when nobody waited any longer, and forget them."""
        with self._changed:
            late = list(self._late)
            self._late.clear()
            return late

    def wait(
        self, message_ids: Iterable[str], timeout_seconds: float | None, raise_if_stopped: Callable[[], None]
    ) -> None:
        """Wait until messages are answered or expired, or the time is up; give up on those that are not answered then.

        Args:
            message_ids: of the messages.
            timeout_seconds: how long to wait; None: until all have an answer.
            raise_if_stopped: called now and then; ends the waiting by an exception.
        """
        end = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        ids = list(message_ids)
        with self._changed:
            try:
                for message_id in ids:
                    self._await(message_id, end, raise_if_stopped)
            finally:
                for message_id in ids:
                    self._give_up(message_id)

    def _await(self, message_id: str, end: float, raise_if_stopped: Callable[[], None]) -> None:
        """Wait until a message is answered or expired, or the end has come, in seconds of `time.monotonic`."""
        while (message := self._pending.get(message_id)) and (rest := end - time.monotonic()) > 0:
            self._changed.wait(min(OUTBOX_POLL_SECONDS, rest))
            if message.expired(now := time.time()):
                self._expire(message, now)
            raise_if_stopped()

    def fail(self, message: Pending, error: Error) -> None:
        """Answer a message that was not posted with an error."""
        with self._changed:
            self._replies[message.id] = reply_to(message.fields, error, time.time())

    def close(self) -> None:
        """Deal no more messages."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def _expire(self, message: Pending, now: float) -> None:
        """Answer a message that is still waited for with the error that its time is over."""
        if self._give_up(message.id):
            reason = f"client {message.node - FIRST_NODE}: no reply within the message's {message.fields['_ttl']:g} s"
            error = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason)
            self._replies[message.id] = reply_to(message.fields, error, now)

    def _give_up(self, message_id: str) -> bool:
        """Wait for a message's reply no longer; return False if this has ended before."""
        message = self._pending.pop(message_id, None)
        if message is not None:
            message.given_up_at = time.monotonic()
        return message is not None
