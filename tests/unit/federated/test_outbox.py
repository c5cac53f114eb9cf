"""Messages that wait for actors: each is dealt once, each client's in order, and none is waited for without end."""

import threading
import time
from collections import Counter
from collections.abc import Sequence

import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.flower.envelope import stamp
from federated.flower.identity import assume_identity
from federated.flower.records import flatten, restore
from federated.launch.contents import Content
from federated.launch.outbox import Outbox, Pending


def pending(nodes: Sequence[int], ttl: float = 100.0) -> list[Pending]:
    assume_identity(run_id=1)
    sent = [Message(RecordDict(), dst_node_id=node, message_type="train", ttl=ttl) for node in nodes]
    return [Pending(stamp(message, str(place)), Content({}, None)) for place, message in enumerate(sent)]


def pace(most: int) -> dict[str, float]:
    """Return the pace of an actor that is handed at most this many messages."""
    return {"train": 4.0 * (most - 1)}


def go_on() -> None:
    """Do not end the waiting."""


def answer(outbox: Outbox, messages: Sequence[Pending], done: int | None = None) -> None:
    outbox.answer(messages, [{} for _ in messages[:done]], {})


def visit(outbox: Outbox, batch: Sequence[Pending], done: int) -> None:
    """Answer the first messages with how often their clients were visited, as their states have it."""
    states = outbox.batch_of(batch).states
    answers = []
    for message in batch[:done]:
        before = restore(states[message.node])["visits"]["count"] if message.node in states else 0
        states[message.node] = {"visits": flatten(MetricRecord({"count": before + 1}))}
        answers.append(states[message.node])
    outbox.answer(batch, answers, states)


@settings(max_examples=30)
@given(
    nodes=st.lists(st.integers(2, 6), max_size=40),
    actors=st.integers(1, 3),
    limits=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
)
def test_each_message_is_answered_once_and_each_clients_in_order(
    nodes: list[int], actors: int, limits: list[tuple[int, int]]
) -> None:
    outbox, messages = Outbox(actors), pending(nodes)
    at_work: Counter[int] = Counter()

    def serve(actor: int) -> None:
        for turn in range(10**6):
            limit, done = limits[(turn + actor) % len(limits)]
            if not (batch := outbox.next_batch(pace(limit))):
                return
            mine = {message.node for message in batch}
            at_work.update(mine)
            assert all(at_work[node] == 1 for node in mine)
            time.sleep(0)
            at_work.subtract(mine)
            visit(outbox, batch, done)

    threads = [threading.Thread(target=serve, args=[actor]) for actor in range(actors)]
    for thread in threads:
        thread.start()
    outbox.post(messages)
    ids = [message.id for message in messages]
    outbox.wait(ids, 60, go_on)
    replies = outbox.collect(ids)
    outbox.close()
    for thread in threads:
        thread.join()
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids
    visits = [(reply.metadata.src_node_id, reply.content["visits"]["count"]) for reply in replies]
    seen: Counter[int] = Counter()
    for node, count in visits:
        seen[node] += 1
        assert count == seen[node]
    assert outbox.collect(ids) == []


def test_shares_shrink_with_what_is_left() -> None:
    outbox = Outbox(actors=2)
    outbox.post(pending(range(2, 18)))
    assert [len(outbox.next_batch({"train": 99.0})) for _ in range(8)] == [4, 3, 3, 2, 1, 1, 1, 1]


def test_a_share_is_worth_a_call_and_no_more_than_a_quarter_of_a_second() -> None:
    outbox = Outbox(actors=2)
    outbox.post(pending(range(2, 1002)))
    assert [message.node for message in outbox.next_batch({})] == [2], "nothing is known of these clients"
    assert [message.node for message in outbox.next_batch({"train": 100.0})] == [*range(3, 29)]
    assert [len(outbox.next_batch({"train": 20_000.0})) for _ in range(3)] == [400, 400, 173]


def test_a_share_is_of_one_type() -> None:
    outbox = Outbox(actors=1)
    messages = pending(range(2, 12))
    for message in messages[2:4]:
        message.fields["_message_type"] = "query.who"
    outbox.post(messages)
    assert [outbox.next_batch({"train": 99.0}), outbox.next_batch({"query.who": 99.0})] == [messages[:2], messages[2:4]]


def test_what_was_not_served_comes_first() -> None:
    outbox = Outbox(actors=1)
    outbox.post(pending(range(2, 10)))
    answer(outbox, outbox.next_batch(pace(3)), done=1)
    assert [message.node for message in outbox.next_batch(pace(3))] == [3, 4, 5]


def test_a_client_gets_its_messages_in_order_when_some_were_not_served() -> None:
    outbox = Outbox(actors=1)
    messages = pending([2] * 6)
    outbox.post(messages)
    answer(outbox, outbox.next_batch(pace(3)), done=1)
    assert outbox.next_batch(pace(2)) == messages[1:3]


def test_a_client_that_is_served_waits_and_others_do_not() -> None:
    outbox = Outbox(actors=1)
    outbox.post(pending([2, 2, 3]))
    first = outbox.next_batch(pace(1))
    assert [message.node for message in outbox.next_batch(pace(1))] == [3]
    answer(outbox, first)
    assert [message.node for message in outbox.next_batch(pace(1))] == [2]


def test_a_message_that_expires_is_not_served() -> None:
    outbox = Outbox(actors=1)
    late, fresh = pending([2], ttl=-1), pending([3])
    fresh[0].fields["_message_id"] = "1"
    outbox.post([*late, *fresh])
    assert outbox.next_batch(pace(9)) == fresh
    (reply,) = outbox.collect(["0", "1"])
    assert (reply.error.code, reply.error.reason) == (
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        "client 0: no reply within the message's -1 s",
    )


def test_what_is_not_answered_in_time_is_given_up() -> None:
    outbox = Outbox(actors=1)
    messages = pending(range(2, 8))
    outbox.post(messages)
    answer(outbox, outbox.next_batch(pace(1)))
    held = outbox.next_batch(pace(1))
    outbox.wait([message.id for message in messages], 0.05, go_on)
    assert [message.given_up_at is None for message in messages] == [True] + [False] * 5
    assert outbox.collect_late() == []
    answer(outbox, held)
    assert [node for node, _ in outbox.collect_late()] == [held[0].node], "it is known that it came"
    assert outbox.collect_late() == []
    assert len(outbox.collect([message.id for message in messages])) == 1
    outbox.post(pending([9]))
    assert [message.node for message in outbox.next_batch(pace(9))] == [9]


def test_waiting_ends_by_an_exception_too() -> None:
    class StoppedError(Exception):
        pass

    def stop() -> None:
        raise StoppedError

    outbox = Outbox(actors=1)
    outbox.post(pending([2]))
    with pytest.raises(StoppedError):
        outbox.wait(["0"], None, stop)
    outbox.post(pending([3]))
    assert [message.node for message in outbox.next_batch(pace(1))] == [3], (
        "what nobody waits for any longer is not served"
    )
