"""Numbers in place of gradients: what a byte holds, and replicas that stay equal to the bit."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raytrain.errors import TrainingError
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.options import ScalarOptions
from raytrain.sync.scalars import decode_one_byte, encode_one_byte, one_byte, scalars
from raytrain.sync.transport import LocalTransport
from raytrain.testing import ThreadGroup, ThreadTransport

EXPONENTS = st.integers(-60, 60)


@given(st.lists(st.floats(width=32), max_size=20), EXPONENTS)
def test_a_byte_holds_a_sign_and_a_logarithm(values: list[float], exponent: int) -> None:
    exponents = np.full(len(values), exponent)
    sent = encode_one_byte(np.array(values, np.float32), exponents)
    assert sent.dtype == np.uint8
    least, most = 2.0 ** (exponent - 10.5), 2.0 ** (exponent + 10.5)
    for value, read in zip(values, decode_one_byte(sent, exponents).tolist(), strict=True):
        if not math.isfinite(value):
            assert math.isnan(read)
        elif value == 0:
            assert read == 0
        else:
            nearest = min(max(abs(value), least), most)
            assert math.copysign(1, read) == math.copysign(1, value)
            assert abs(math.log2(abs(read) / nearest)) <= 1 / 12 + 1e-6


@given(st.integers(0, 255), EXPONENTS)
def test_a_byte_that_is_read_is_written_again(sent: int, exponent: int) -> None:
    exponents = np.array([exponent])
    assert encode_one_byte(decode_one_byte(np.array([sent], np.uint8), exponents), exponents)[0] == sent


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("kind", "size"), [(scalars, 4), (one_byte, 1)])
def test_all_replicas_read_the_same_and_bytes_are_counted(kind: Any, size: int, known: bool, weighted: bool) -> None:
    """What is not known yet travels in four bytes; weights too, which differ."""
    own = [[0.5, -3.0], [float("nan"), 1e-9], [1e300, float("inf")]]

    def replica(transport: ThreadTransport) -> tuple[Any, int]:
        sync = kind(ExactAverager(transport), ScalarOptions(name="x"))
        sync.attach(nn.Linear(2, 2))
        sync.set_weight([1.0, 2.0, 0.0][transport.rank])
        before = sync.bytes_sent
        sizes = [[1.0, 2.0], [1e-3, 1e-9 if known else 0.0], [5.0, 5.0]]
        return sync.all_gather(own[transport.rank], sizes, weighted=weighted), sync.bytes_sent - before

    answers = ThreadGroup(3).run(replica)
    assert all(repr(answer) == repr(answers[0]) for answer in answers)
    (read, shares), sent = answers[0]
    assert sent == 2 * (size if known else 4) + 4 * weighted
    assert shares == ([1.0, 2.0, 0.0] if weighted else [1.0] * 3)
    assert read[0] == pytest.approx([0.5, -3.0], rel=0.06)
    assert read[1][1] == pytest.approx(1e-9, rel=0.06)
    assert not any(map(math.isfinite, (read[1][0], *read[2])))


@pytest.mark.parametrize(
    ("values", "told"), [([1e-9, 1.0, 1.0], False), ([1e-9, 1.0, 1e9], True), ([0.0, 0.0, 1.0], True)]
)
def test_slopes_that_a_byte_does_not_hold_are_counted_and_told_once(
    values: list[float], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    sync = one_byte(ExactAverager(LocalTransport()), ScalarOptions(name="x"))
    sync.attach(nn.Linear(2, 2))
    for _ in range(60):
        sync.all_gather(values, [[1.0, 1.0, 1.0]], weighted=False)
    beyond = sum(abs(math.log2(value)) > 10.5 for value in values if value)
    assert sync.metrics() == {"zeros": values.count(0.0), "saturated": beyond}
    assert [f"{22 * values.count(0.0)} were 0" in text for text in caplog.messages] == [True] * told
    assert scalars(ExactAverager(LocalTransport()), ScalarOptions(name="x")).metrics() == {}


@given(st.integers(0, 9), st.integers(1, 4))
def test_a_request_to_stop_that_lasts_one_step_reaches_all(step: int, every: int) -> None:
    """The command looks for it now and then, and sees it in one step of many."""

    def replica(transport: ThreadTransport) -> list[int]:
        sync = one_byte(ExactAverager(transport), ScalarOptions(name="x", stop_every=every, check_every=0))
        sync.attach(nn.Linear(2, 2))
        asks = [transport.rank == 1 and now == step for now in range(step + every + 1)]
        return [now for now, stop in enumerate(asks) if sync.before_step(0.0, stop=stop).stop]

    first, second = ThreadGroup(2).run(replica)
    assert first == second
    assert step <= first[0] < step + every


def test_replicas_that_are_no_longer_equal_are_named() -> None:
    def replica(transport: ThreadTransport) -> str:
        module = nn.Linear(2, 2)
        sync = one_byte(ExactAverager(transport), ScalarOptions(name="x", check_every=2))
        sync.attach(module)
        for step in range(2):
            sync.before_step(0.0, stop=False)
            if step == 1 and transport.rank == 2:
                with torch.no_grad():
                    module.weight[0, 0] += 1e-6
            try:
                sync.after_step(1.0)
            except TrainingError as error:
                return str(error)
        return ""

    answers = ThreadGroup(3).run(replica)
    assert all(answer.startswith("the parameters of worker 2 differ from those of worker 0") for answer in answers)
