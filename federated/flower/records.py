"""The records of messages as plain dictionaries, which are quick to copy and to send to another process.

This relies on the instance dictionaries of Flower 1.41. Arrays and bytes are shared by all copies: nobody changes them
in place.
"""

from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

FlowerRecord = ArrayRecord | MetricRecord | ConfigRecord
FlatRecord = tuple[type[FlowerRecord], dict[str, Any]]
"""The class of a record, and its instance dictionary."""

FlatContent = dict[str, FlatRecord]
"""The records of a message, by name."""


def flatten(record: FlowerRecord) -> FlatRecord:
    """Return a record as it is now."""
    return type(record), _copied(record.__dict__)


def flatten_all(content: RecordDict) -> FlatContent:
    """Return the records of a message as they are now."""
    return {name: flatten(record) for name, record in content.items()}


def restore(flat: FlatContent) -> RecordDict:
    """Return records that can be set, popped and emptied without a trace in `flat`."""
    content = RecordDict()
    records = content.__dict__["_data"]
    for name, (kind, state) in flat.items():
        records[name] = record = kind.__new__(kind)
        record.__dict__ = _copied(state)
    return content


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a record's instance dictionary that has its own data, and own lists in them."""
    data = {key: list(value) if isinstance(value, list) else value for key, value in state["_data"].items()}
    return {**state, "_data": data}
