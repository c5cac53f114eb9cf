"""The records of messages as actors get them: what several messages of a round share is in the object store, once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from flwr.app import RecordDict

from federated.flower.records import FlatContent, FlatRecord, FlowerRecord, flatten


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """The records of a message.

    Attributes:
        records: name -> a record, or the place of a shared one.
        shared: what the object store has: a list of shared records; None: nothing.
    """

    records: Mapping[str, FlatRecord | int]
    shared: ray.ObjectRef | None


def pack_contents(contents: Sequence[RecordDict]) -> dict[int, Content]:
    """Return contents as they are now, by the `id` of each.

    Args:
        contents: of messages that are sent together; several may have the same one, or different ones around the same
            records, as those of a Flower strategy have.
    """
    uses = Counter(map(id, contents))
    distinct = {id(content): content for content in contents}
    counts: Counter[int] = Counter()
    records: dict[int, FlowerRecord] = {}
    for key, content in distinct.items():
        for record in content.values():
            counts[id(record)] += uses[key]
            records[id(record)] = record
    shared = [key for key in records if counts[key] > 1]
    places = {key: place for place, key in enumerate(shared)}
    ref = ray.put([flatten(records[key]) for key in shared]) if shared else None

    def reference(record: FlowerRecord) -> FlatRecord | int:
        return places[id(record)] if id(record) in places else flatten(record)

    return {
        key: Content({name: reference(record) for name, record in content.items()}, ref)
        for key, content in distinct.items()
    }


class Unpacker:
    """Gives contents their records back, and keeps what is shared for as long as messages refer to it."""

    def __init__(self) -> None:
        self._shared: dict[ray.ObjectRef, list[FlatRecord]] = {}

    def unpack(self, contents: Sequence[Content]) -> dict[int, FlatContent]:
        """Return the records of contents, by the `id` of each."""
        distinct = {id(content): content for content in contents}
        refs = {content.shared for content in distinct.values() if content.shared is not None}
        self._shared = {ref: self._shared[ref] if ref in self._shared else ray.get(ref) for ref in refs}
        return {key: self._records(content) for key, content in distinct.items()}

    def _records(self, content: Content) -> FlatContent:
        shared = self._shared.get(content.shared, [])
        return {name: shared[record] if isinstance(record, int) else record for name, record in content.records.items()}
