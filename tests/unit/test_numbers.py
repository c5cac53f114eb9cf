"""Numbers in place of gradients: what a byte holds, and replicas that stay equal to the bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raytrain.errors import TrainingError
from raytrain.sync.exchange import ExactExchange
from raytrain.sync.numbers import NumberOptions, decode, encode, numbers, one_byte
from raytrain.testing import ThreadGroup, ThreadTransport


@given(st.lists(st.floats(width=32), max_size=20))
def test_a_byte_holds_a_sign_and_a_logarithm(values: list[float]) -> None:
    sent = encode(np.array(values, np.float32))
    assert sent.dtype == np.uint8
    for value, read in zip(values, decode(sent).tolist(), strict=True):
        if not math.isfinite(value):
            assert math.isnan(read)
        elif abs(value) < 2**-11.7:
            assert read == 0
        elif 2**-10.5 <= abs(value) <= 2**10.5:
            assert math.copysign(1, read) == math.copysign(1, value)
            assert abs(math.log2(abs(read / value))) <= 1 / 12 + 1e-6
        elif abs(value) > 2**10.5:
            assert read == math.copysign(np.float32(2**10.5), value)


@given(st.integers(0, 255))
def test_a_byte_that_is_read_is_written_again(sent: int) -> None:
    assert encode(decode(np.array([sent], np.uint8)))[0] == sent


@pytest.mark.parametrize(("kind", "size"), [(numbers, 4), (one_byte, 1)])
def test_all_replicas_read_the_same_and_bytes_are_counted(kind: object, size: int) -> None:
    own = [[0.5, -3.0], [float("nan"), 1e-9], [1e300, float("inf")]]

    def replica(transport: ThreadTransport) -> tuple[list[list[float]], int]:
        sync = kind(ExactExchange(transport), NumberOptions(name="x"))  # type: ignore[operator]
        sync.start(nn.Linear(2, 2))
        before = sync.bytes_sent
        return sync.share(own[transport.rank]), sync.bytes_sent - before

    answers = ThreadGroup(3).run(replica)
    assert all(repr(answer) == repr(answers[0]) for answer in answers)
    read, sent = answers[0]
    assert sent == 2 * size
    assert (read[0][0] > 0, read[0][1] < 0) == (True, True)
    assert not any(map(math.isfinite, (read[1][0], *read[2])))


def test_a_request_to_stop_reaches_all_after_some_steps() -> None:
    def replica(transport: ThreadTransport) -> list[bool]:
        sync = one_byte(ExactExchange(transport), NumberOptions(name="x", stop_every=3, check_every=0))
        sync.start(nn.Linear(2, 2))
        return [sync.before_step(0.0, stop=step >= 1 and transport.rank == 1).stop for step in range(6)]

    assert ThreadGroup(2).run(replica) == [[False, False, True, False, False, True]] * 2


def test_replicas_that_are_no_longer_equal_are_named() -> None:
    def replica(transport: ThreadTransport) -> str:
        module = nn.Linear(2, 2)
        sync = one_byte(ExactExchange(transport), NumberOptions(name="x", check_every=2))
        sync.start(module)
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
