"""Records as plain dictionaries: whole, and apart from what they were made of."""

from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from federated.flower.records import flatten_all, restore

numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
metrics = st.dictionaries(st.text(), numbers | st.lists(st.integers(0, 9)), max_size=3).map(MetricRecord)
values = numbers | st.text() | st.binary() | st.booleans() | st.lists(st.binary())
configs = st.dictionaries(st.text(), values, max_size=3).map(ConfigRecord)
contents = st.dictionaries(st.text(), metrics | configs, max_size=3).map(RecordDict)


def arrays() -> ArrayRecord:
    import numpy as np

    return ArrayRecord([np.arange(3.0), np.zeros((0, 2), np.int32)])


@given(contents)
def test_records_come_back(content: RecordDict) -> None:
    content["arrays"] = arrays()
    copy = restore(flatten_all(content))
    assert copy == content
    assert {name: type(record) for name, record in copy.items()} == {
        name: type(record) for name, record in content.items()
    }
    assert copy.object_id == content.object_id, "Flower sends the same bytes for both"


def test_neither_the_original_nor_a_copy_can_change_another() -> None:
    content = RecordDict({"arrays": arrays(), "config": ConfigRecord({"names": ["a"], "raw": b"x"})})
    flat = flatten_all(content)

    def spoil(records: Any) -> None:
        records["config"]["names"].append("b")
        records["config"]["raw"] = b"y"
        records["arrays"].clear()
        del records["arrays"]
        records["more"] = ConfigRecord()

    spoil(content)
    for _ in range(2):
        copy = restore(flat)
        assert dict(copy["config"]) == {"names": ["a"], "raw": b"x"}
        assert copy["arrays"] == arrays()
        assert len(copy) == 2
        copy["more"] = ConfigRecord()
        copy["arrays"]["2"] = copy["arrays"].pop("0")
        assert copy["arrays"].object_id != arrays().object_id, "no stale id"
        spoil(restore(flat))
