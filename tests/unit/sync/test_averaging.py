import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.testing import ThreadGroup, ThreadTransport


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(0, 50, allow_subnormal=False)), min_size=1, max_size=4))
def test_the_mean_counts_by_weight(contributions: list[tuple[float, float]]) -> None:
    weight = sum(weight for _, weight in contributions)
    mean = sum(value * own for value, own in contributions) / weight if weight else 0.0

    def replica(transport: ThreadTransport) -> list[float]:
        value, own = contributions[transport.rank]
        value = value if own else float("nan")  # which does not count
        return ExactAverager(transport).average(torch.tensor([value, -1.0], dtype=torch.float64), own).wait().tolist()

    for found, total in ThreadGroup(len(contributions)).run(replica):
        assert total == pytest.approx(weight)
        assert found == pytest.approx(mean, abs=1e-9)


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4))
def test_everybody_gets_every_payload(payloads: list[bytes]) -> None:
    answers = ThreadGroup(len(payloads)).run(
        lambda transport: ExactAverager(transport).all_gather_bytes(payloads[transport.rank])
    )
    assert answers == [payloads] * len(payloads)


def test_alone() -> None:
    averager = ExactAverager(LocalTransport())
    assert averager.all_gather_bytes(b"x") == [b"x"]
    assert averager.average(torch.tensor([4.0, 0.0]), 2.0).wait().tolist() == [4.0, 2.0]
