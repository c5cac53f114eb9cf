"""Buffers over replicas: means that stay between what is averaged, and bits that stay where nobody changed them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raytrain.sync.buffers import BufferMean, floating_buffers
from raytrain.sync.step_message import StepMessage
from raytrain.tensors import bits_of

TYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
PLACES = st.lists(st.floats(2**-10, 1e4, width=16), min_size=3, max_size=3)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(bits_of(one), bits_of(other))


def mean_of(replicas: list[BufferMean], weights: list[float]) -> Tensor:
    """Return the weighted mean of messages in float32, as replicas send it."""
    messages = torch.zeros(len(replicas), replicas[0].size)
    for replica, message in zip(replicas, messages, strict=True):
        replica.pack(message)
    counted = messages[torch.tensor(weights) > 0]
    held = torch.tensor([weight for weight in weights if weight])
    return (held[:, None] * counted).sum(0) / (held.sum() or 1.0)


@given(TYPES, st.lists(st.tuples(PLACES, st.integers(0, 70_000)), min_size=1, max_size=4))
def test_a_shared_buffer_is_between_those_that_count(dtype: torch.dtype, drawn: list[tuple[list[float], int]]) -> None:
    start, weights = torch.ones(3, dtype=dtype), [weight for _, weight in drawn]
    replicas = [BufferMean([start.clone()]) for _ in drawn]
    for replica, (place, _) in zip(replicas, drawn, strict=True):
        replica.local[0].copy_(torch.tensor(place))
    mean = mean_of(replicas, weights)
    counted = [replica.local[0] for replica, weight in zip(replicas, weights, strict=True) if weight] or [start]
    for replica in replicas:
        replica.unpack(mean)
        low, high = torch.stack(counted).amin(0).double(), torch.stack(counted).amax(0).double()
        found = replica.anchor[0].double()
        assert ((low * (1 - 1e-6) <= found) & (found <= high * (1 + 1e-6))).all()


ODD = torch.tensor([0.1, -torch.inf, torch.nan, -0.0])


@given(TYPES, st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(any), st.floats(0.5, 1.0))
def test_a_buffer_that_nobody_changed_keeps_its_bits(dtype: torch.dtype, weights: list[int], pull: float) -> None:
    """Beside one that changes: a mask holds -inf, and 0.1 is no mean of itself in floating-point numbers."""
    replicas = [BufferMean([ODD.to(dtype), torch.zeros(2)]) for _ in weights]
    for _ in range(3):
        for replica in replicas:
            replica.local[1].add_(1.0)
        mean = mean_of(replicas, list(map(float, weights)))
        for replica in replicas:
            replica.start_round(keep=True)
            replica.unpack(mean)
            replica.approach(pull)
    for replica in replicas:
        assert same(replica.local[0], ODD.to(dtype))
        assert same(replica.anchor[0], ODD.to(dtype))
        assert torch.equal(replica.local[1], torch.full((2,), 3.0))
        assert torch.equal(replica.anchor[1], torch.full((2,), 3.0))


@settings(max_examples=200)
@given(TYPES, PLACES, PLACES, PLACES, st.floats(0.0, 1.0))
def test_a_replica_goes_towards_the_shared_buffer_and_not_past_it(
    dtype: torch.dtype, sent: list[float], now: list[float], shared: list[float], pull: float
) -> None:
    mean = BufferMean([torch.tensor(sent).to(dtype)])
    mean.start_round(keep=True)
    mean.local[0].copy_(own := torch.tensor(now).to(dtype))
    mean.anchor[0].copy_(torch.tensor(shared))
    mean.approach(pull)
    low, high = torch.minimum(own, mean.anchor[0]), torch.maximum(own, mean.anchor[0])
    assert ((low <= mean.local[0]) & (mean.local[0] <= high)).all()


@given(TYPES, PLACES, PLACES)
def test_at_once_a_replica_goes_on_from_the_shared_buffer(
    dtype: torch.dtype, sent: list[float], shared: list[float]
) -> None:
    mean = BufferMean([torch.tensor(sent).to(dtype)])
    mean.start_round(keep=True)
    mean.anchor[0].copy_(torch.tensor(shared))
    mean.approach(1.0)
    assert same(mean.local[0], mean.anchor[0])


def test_a_distance_that_is_undone_by_itself_is_not_taken_out_again() -> None:
    """A running variance of 1000 that inputs of variance 10 bring to 300 meanwhile; the shared one is 500."""
    mean = BufferMean([torch.tensor([1000.0])])
    mean.start_round(keep=True)
    mean.local[0].fill_(300.0)
    mean.anchor[0].fill_(500.0)
    mean.approach(1.0)
    assert mean.local[0].item() == 300.0


def test_only_floating_buffers_of_the_state_count_and_tied_ones_once() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    module[1].running_mean = module[0].running_mean
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert len(floating_buffers(module)) == 3


@pytest.mark.parametrize("weights", [[1.0, 3.0], [0.1, 0.3], [0.0, 0.2], [0.0, 0.0]])
def test_in_every_step_buffers_become_the_weighted_mean_whatever_the_weights_sum_to(weights: list[float]) -> None:
    modules = [nn.BatchNorm1d(2).double() for _ in weights]
    rests = [StepMessage(module, torch.device("cpu")) for module in modules]
    for module, place, weight in zip(modules, (2.0, 6.0), weights, strict=True):
        module.running_var.fill_(place if weight else torch.nan)
    packed = [rest.pack([weight, 7.0]) for rest, weight in zip(rests, weights, strict=True)]
    expected = (2.0 * weights[0] + 6.0 * weights[1]) / sum(weights) if sum(weights) else 1.0
    for rest, module in zip(rests, modules, strict=True):
        assert rest.unpack(sum(packed)) == [sum(weights), 14.0]
        torch.testing.assert_close(module.running_var, torch.full((2,), expected, dtype=torch.float64))
