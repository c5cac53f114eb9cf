from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.names import resolve
from raytrain.sync.compressed import CODECS, CompressedExchange
from raytrain.testing import ThreadGroup, ThreadTransport

ERRORS = {"bfloat16": 2**-7, "int8": 1 / 127}
"""The largest error of a codec, as a share of a block's largest value."""

every_codec = pytest.mark.parametrize("name", CODECS)


def codec(name: str) -> Any:
    return resolve(CODECS, name, "sync.codec")()


@every_codec
@given(blocks=st.integers(1, 5), seed=st.integers(0, 99), power=st.integers(-30, 30))
def test_a_codec_is_as_wide_as_it_says_and_nearly_right(name: str, blocks: int, seed: int, power: int) -> None:
    one = codec(name)
    values = torch.randn(blocks, one.block, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    payload = one.encode(values)
    assert (payload.dtype, payload.shape) == (torch.uint8, (blocks, one.block_bytes))
    largest = values.abs().amax(dim=1, keepdim=True)
    assert ((one.decode(payload) - values).abs() <= 0.51 * ERRORS[name] * largest + 1e-38).all()
    assert torch.equal(one.decode(one.encode(torch.zeros_like(values))), torch.zeros_like(values))


@every_codec
@settings(max_examples=20)
@given(
    members=st.integers(1, 3),
    count=st.sampled_from([1, 7, 1024, 5000]),
    weights=st.lists(st.integers(0, 70_000), min_size=3, max_size=3),
    rounds=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_sums_are_exact_over_time_and_equal_to_the_bit(
    name: str, members: int, count: int, weights: list[int], rounds: int, seed: int
) -> None:
    """Error feedback: what all rounds gave, and what is left to send, is what all rounds had."""
    generator = torch.Generator().manual_seed(seed)
    given_values = torch.randn(rounds, members, count, generator=generator)
    shares = torch.tensor(weights[:members], dtype=torch.float64)
    total = shares.sum().item()

    def replica(transport: ThreadTransport) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        exchange = CompressedExchange(transport, codec(name))
        means = []
        for turn in range(rounds):
            flat = torch.cat([given_values[turn, transport.rank], torch.zeros(1)])
            flat = exchange.mean(flat, weights[transport.rank]).wait()
            assert flat[-1].item() == pytest.approx(total)
            means.append(flat[:-1].clone())
        return means, exchange.left, exchange.left_of_sum

    answers = ThreadGroup(members).run(replica)
    for means, _, _ in answers:
        assert all(map(torch.equal, means, answers[0][0]))
    if total:
        share = (shares / total).view(-1, 1)
        had = sum(((share * given_values[turn].double()).sum(0) for turn in range(rounds)), torch.zeros(count))
        unsent = sum((share[rank] * left.flatten().double() for rank, (_, left, _) in enumerate(answers)), 0.0)
        unsent += torch.cat([left_of_sum.flatten().double() for _, _, left_of_sum in answers])
        gave = torch.stack(answers[0][0]).double().sum(0)
        torch.testing.assert_close(gave + unsent[:count], had.double(), rtol=0, atol=1e-4)
