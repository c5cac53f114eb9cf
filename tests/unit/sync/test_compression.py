from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raytrain.registry import resolve
from raytrain.sync.compression import CompressedAverager
from raytrain.sync.options import COMPRESSIONS
from raytrain.testing import ThreadGroup, ThreadTransport

ERRORS = {"bfloat16": 2**-7, "int8": 1 / 127}
"""The largest error of a compressor, as a share of a block's largest value."""

every_compressor = pytest.mark.parametrize("name", COMPRESSIONS)


def compressor(name: str) -> Any:
    return resolve(COMPRESSIONS, name, "sync.compression")()


@every_compressor
@given(blocks=st.integers(1, 5), seed=st.integers(0, 99), power=st.integers(-30, 30))
def test_a_compressor_is_as_wide_as_it_says_and_nearly_right(name: str, blocks: int, seed: int, power: int) -> None:
    one = compressor(name)
    values = torch.randn(blocks, one.block, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    payload = one.compress(values)
    assert (payload.dtype, payload.shape) == (torch.uint8, (blocks, one.block_bytes))
    largest = values.abs().amax(dim=1, keepdim=True)
    assert ((one.decompress(payload) - values).abs() <= 0.51 * ERRORS[name] * largest + 1e-38).all()
    assert torch.equal(one.decompress(one.compress(torch.zeros_like(values))), torch.zeros_like(values))


@every_compressor
@settings(max_examples=30)
@example(members=1, count=7, weights=[[5, 0, 0], [0, 0, 0], [9, 0, 0]], seed=0)
@given(
    members=st.integers(1, 3),
    count=st.sampled_from([1, 7, 1024, 5000]),
    weights=st.lists(st.lists(st.just(0) | st.integers(0, 70_000), min_size=3, max_size=3), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_sums_are_exact_over_time_and_equal_to_the_bit(
    name: str, members: int, count: int, weights: list[list[int]], seed: int
) -> None:
    """Error feedback, with other weights in each round: sum W m + residuals = sum w_i v_i."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(weights), members, count, generator=generator)
    counts = torch.tensor(weights, dtype=torch.float64)[:, :members]

    def replica(transport: ThreadTransport) -> tuple[list[torch.Tensor], Any, Any]:
        averager = CompressedAverager(transport, compressor(name))
        means = []
        for turn, own in enumerate(counts):
            flat = torch.cat([values[turn, transport.rank], torch.zeros(1)])
            flat = averager.average(flat, own[transport.rank].item()).wait()
            assert flat[-1].item() == pytest.approx(own.sum().item())
            assert own.any() or not flat.any()
            means.append(flat[:-1].clone())
        return means, averager.residual, averager.sum_residual

    answers = ThreadGroup(members).run(replica)
    for means, _, _ in answers:
        assert all(map(torch.equal, means, answers[0][0]))
    had = torch.einsum("tm,tmc->c", counts, values.double())
    gave = torch.einsum("t,tc->c", counts.sum(1), torch.stack(answers[0][0]).double())
    sums = [sum_residual for _, _, sum_residual in answers if sum_residual is not None]
    unsent = sum((left.flatten().double()[:count] for _, left, _ in answers if left is not None), torch.zeros(count))
    if sums:
        unsent += torch.cat([one.flatten().double() for one in sums])[:count]
    torch.testing.assert_close(gave + unsent, had, rtol=0, atol=1e-6 * (counts.sum().item() + 1))


@every_compressor
def test_what_is_exact_stays_so_and_a_replica_without_weight_may_hold_anything(name: str) -> None:
    tails = torch.tensor([[0.1, -torch.inf, 3e-9], [torch.nan, torch.inf, 1.0]])

    def replica(transport: ThreadTransport) -> torch.Tensor:
        flat = torch.cat([torch.full((10,), [0.5, torch.nan][transport.rank]), tails[transport.rank], torch.zeros(1)])
        return (
            CompressedAverager(transport, compressor(name)).average(flat, 5.0 * (transport.rank == 0), exact=3).wait()
        )

    for flat in ThreadGroup(2).run(replica):
        torch.testing.assert_close(flat[:10], torch.full((10,), 0.5))
        assert torch.equal(flat[10:], torch.tensor([0.1, -torch.inf, 3e-9, 5.0]))
