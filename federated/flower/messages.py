"""Payloads and reports in Flower's messages: one record with one key of one letter, around the bytes."""

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from federated.encodings import PayloadError

MESSAGE_NAME = "p"
"""Of the record and of its key: every letter travels."""


def content_of(data: bytes) -> RecordDict:
    """Return the content of a message around a payload or a report."""
    return RecordDict({MESSAGE_NAME: ConfigRecord({MESSAGE_NAME: data})})


def bytes_of(content: RecordDict) -> bytes:
    """Return the payload or report in a message's content.

    Raises:
        PayloadError: there is something else.
    """
    record = content.get(MESSAGE_NAME)
    data = record.get(MESSAGE_NAME) if isinstance(record, ConfigRecord) and len(content) == len(record) == 1 else None
    if not isinstance(data, bytes):
        raise PayloadError(f"expected one record {MESSAGE_NAME!r} with bytes; got records {sorted(content)}"[:200])
    return data


def shipped_bytes(message: Message) -> int:
    """Return the size of what Flower ships of a message: all of its objects."""
    return sum(len(each.deflate()) for each in get_all_nested_objects(message).values())
