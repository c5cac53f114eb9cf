"""Copies of Flower's messages that are made without its constructors are what these would have made."""

import time

from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from federated.flower.envelope import message_of, reply_to, stamp
from federated.flower.identity import assume_identity


def sent(node: int = 7, group: str = "3", ttl: float = 60.0) -> Message:
    assume_identity(run_id=5)
    content = RecordDict({"config": ConfigRecord({"lr": 0.1})})
    return Message(content, dst_node_id=node, message_type="train.probe", group_id=group, ttl=ttl)


@given(node=st.integers(0, 2**63), group=st.text(), ttl=st.floats(1, 1e6))
def test_a_copy_has_the_metadata_of_the_message(node: int, group: str, ttl: float) -> None:
    message = sent(node, group, ttl)
    fields = stamp(message, "17")
    copy = message_of(dict(fields), message.content)
    assert message.metadata.message_id == "17"
    assert copy.metadata == message.metadata
    assert copy.content == message.content
    assert not copy.has_error()


def test_a_reply_is_what_flower_would_have_made_of_it() -> None:
    message = sent()
    fields = stamp(message, "17")
    content = RecordDict({"metrics": MetricRecord({"loss": 1.0})})
    theirs, ours = Message(content, reply_to=message), reply_to(fields, content, time.time())
    assert ours.metadata.message_id == "17-reply"
    assert abs(ours.metadata.created_at - theirs.metadata.created_at) < 5
    expires = ours.metadata.created_at + ours.metadata.ttl
    assert expires == message.metadata.created_at + message.metadata.ttl
    for reply in (ours, theirs):  # these three differ
        reply.metadata.__dict__["_message_id"], reply.metadata.created_at, reply.metadata.ttl = "", 0.0, 0.0
    assert ours.metadata == theirs.metadata
    assert ours.content is content
    assert ours.deflate() == theirs.deflate(), "so it is one for all of Flower"
    failed = reply_to(fields, Error(2, "no data"), 0.0)
    assert (failed.has_content(), failed.error.reason) == (False, "no data")
