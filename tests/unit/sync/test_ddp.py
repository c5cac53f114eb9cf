import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from raytrain.errors import TrainingError
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.ddp import DataParallel, make_buckets
from raytrain.sync.synchroniser import StepTotals
from raytrain.sync.transport import LocalTransport, PeerLostError
from raytrain.testing import ThreadGroup, ThreadTransport, TinyModel, TinyOptions


@given(
    st.lists(st.tuples(st.integers(0, 700), st.sampled_from([torch.float32, torch.float64])), max_size=20),
    st.integers(1, 5000),
)
def test_cutting_and_joining_is_the_identity(shapes: list[tuple[int, torch.dtype]], limit: int) -> None:
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in shapes]
    runs = make_buckets(tensors, limit)
    assert [id(tensor) for run in runs for tensor in run] == [id(tensor) for tensor in tensors]
    for run in runs:
        assert len({tensor.dtype for tensor in run}) == 1
        assert len(run) == 1 or sum(tensor.numel() * tensor.element_size() for tensor in run) <= limit


def backward(module: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> float:
    """Put the gradient of the weighted mean in place, as the loop does; return sum of weight * loss."""
    total = (module(x).square() * weights).sum()
    (total / (weights.sum() or 1.0)).backward()
    return total.item()


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    st.sampled_from([1, 70, 10_000]),
    st.integers(0, 2**31),
)
def test_the_mean_is_that_of_one_replica_with_everything(sizes: list[int], bucket_bytes: int, seed: int) -> None:
    """Shards of any size, empty ones included, with weights of any size, and pieces of any size."""
    torch.manual_seed(seed)
    whole = TinyModel(TinyOptions(name="tiny")).double()
    x, weights = torch.randn(sum(sizes), 4, dtype=torch.float64), torch.rand(sum(sizes), dtype=torch.float64)
    expected = copy.deepcopy(whole)
    loss = backward(expected, x, weights)

    def replica(transport: ThreadTransport) -> tuple[dict[str, Any], StepTotals]:
        module = copy.deepcopy(whole)
        start = sum(sizes[: transport.rank])
        mine = slice(start, start + sizes[transport.rank])
        sync = DataParallel(ExactAverager(transport), bucket_bytes)
        sync.attach(module)
        sync.set_weight(weights[mine].sum().item())
        sync.before_backward()
        totals = sync.before_step(backward(module, x[mine], weights[mine]), stop=transport.rank == len(sizes) - 1)
        return {name: value.grad for name, value in module.named_parameters()}, totals

    for gradients, totals in ThreadGroup(len(sizes)).run(replica):
        assert totals.stop is True
        assert totals.loss == pytest.approx(loss)
        assert totals.weight == pytest.approx(weights.sum().item())
        for name, value in expected.named_parameters():
            if value.grad is None:
                assert gradients[name] is None, f"{name} has no gradient on one replica"
            else:
                torch.testing.assert_close(gradients[name], value.grad, rtol=1e-12, atol=1e-14)


@given(st.sampled_from([torch.bfloat16, torch.float16]), st.lists(st.integers(0, 70_000), min_size=2, max_size=3))
def test_weights_and_gradients_of_narrow_types_are_rounded_once(dtype: torch.dtype, weights: list[int]) -> None:
    """Token counts above 256 are no bfloat16, and above 65504 no float16."""
    own = torch.linspace(-1, 1, 7, dtype=torch.float64)[None] * torch.arange(1.0, len(weights) + 1)[:, None]
    counts = torch.tensor(weights, dtype=torch.float64)[:, None]
    exact = (counts * own.to(dtype).double()).sum(0) / (counts.sum() or 1.0)

    def replica(transport: ThreadTransport) -> torch.Tensor | None:
        module = nn.Linear(7, 1, bias=False).to(dtype)
        sync = DataParallel(ExactAverager(transport), 0)
        sync.attach(module)
        sync.set_weight(weights[transport.rank])
        sync.before_backward()
        module.weight.grad = own[transport.rank][None].to(dtype)
        sync.before_step(0.0, stop=False)
        return module.weight.grad

    for gradient in ThreadGroup(len(weights)).run(replica):
        assert gradient.dtype == dtype
        if sum(weights):
            torch.testing.assert_close(gradient[0].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_replicas_start_as_the_first_one() -> None:
    def replica(transport: ThreadTransport) -> list[torch.Tensor]:
        module = TinyModel(TinyOptions(name="tiny", norm=True))
        for value in module.parameters():
            value.data.fill_(transport.rank)
        module.norm.running_mean.fill_(transport.rank)
        DataParallel(ExactAverager(transport), 100).attach(module)
        return list(module.state_dict().values())

    for state in ThreadGroup(3).run(replica):
        assert all((value == 0).all() for value in state if value.dtype != torch.int64 and value.min() != 1)


def test_moving_buffers_stay_equal_and_move_by_the_mean() -> None:
    torch.manual_seed(0)
    start = nn.BatchNorm1d(4).double()
    batches = [torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64) + 3]
    weights = [1.0, 3.0]
    alone = [copy.deepcopy(start) for _ in batches]
    for module, batch in zip(alone, batches, strict=True):
        module(batch)
    mean = (weights[0] * alone[0].running_mean + weights[1] * alone[1].running_mean) / 4

    def replica(transport: ThreadTransport) -> nn.BatchNorm1d:
        module = copy.deepcopy(start)
        sync = DataParallel(ExactAverager(transport), 100)
        sync.attach(module)
        sync.set_weight(weights[transport.rank])
        sync.before_backward()
        module(batches[transport.rank]).sum().backward()
        sync.before_step(0.0, stop=False)
        return module

    first, second = ThreadGroup(2).run(replica)
    torch.testing.assert_close(first.running_mean, mean)
    assert torch.equal(first.running_mean, second.running_mean)
    assert torch.equal(first.running_var, second.running_var)
    assert first.num_batches_tracked == 1


def test_constant_buffers_never_drift() -> None:
    """Averaging equal numbers with weights rounds; averaging their movement, which is zero, does not."""
    constant = torch.rand(100) * 1e3

    def replica(transport: ThreadTransport) -> torch.Tensor:
        module = nn.Linear(2, 1)
        module.register_buffer("constant", constant.clone())
        sync = DataParallel(ExactAverager(transport), 100)
        sync.attach(module)
        for _ in range(20):
            sync.set_weight(0.3 + transport.rank)
            sync.before_backward()
            module(torch.ones(1, 2)).sum().backward()
            sync.before_step(0.0, stop=False)
        return module.constant

    for buffer in ThreadGroup(3).run(replica):
        assert torch.equal(buffer, constant)


def test_gradients_of_earlier_micro_batches_count() -> None:
    """A parameter that only an earlier micro-batch used is averaged too."""

    def replica(transport: ThreadTransport) -> torch.Tensor | None:
        used, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        module = nn.ModuleList([used, other])
        sync = DataParallel(ExactAverager(transport), 4)
        sync.attach(module)
        other(torch.full((1, 1), 1.0 + transport.rank)).sum().backward()
        sync.set_weight(1.0)
        sync.before_backward()
        used(torch.ones(1, 1)).sum().backward()
        sync.before_step(0.0, stop=False)
        return other.weight.grad

    assert [gradient.item() for gradient in ThreadGroup(2).run(replica)] == [1.5, 1.5]


def test_a_gradient_in_two_parts_is_refused() -> None:
    """Re-entrant checkpointing of a shared layer gives its gradient twice; taking the first part would be wrong."""
    shared = nn.Linear(3, 3, bias=False)

    def replica(transport: ThreadTransport) -> None:
        module = copy.deepcopy(shared)
        sync = DataParallel(ExactAverager(transport), 100)
        sync.attach(module)
        sync.set_weight(1.0)
        sync.before_backward()
        x = torch.ones(1, 3, requires_grad=True)
        for _ in range(2):
            x = checkpoint(module, x, use_reentrant=True)
        with pytest.raises(TrainingError, match=r"^a parameter of shape \(3, 3\) got its gradient in two parts"):
            x.sum().backward()

    ThreadGroup(2).run(replica)


def test_alone_nothing_is_sent_or_copied() -> None:
    module = TinyModel(TinyOptions(name="tiny"))
    sync = DataParallel(ExactAverager(LocalTransport()), 100)
    sync.attach(module)
    sync.set_weight(2.0)
    sync.before_backward()
    loss = backward(module, torch.randn(2, 4), torch.ones(2))
    gradient = module.out.weight.grad
    assert sync.before_step(loss, stop=False) == StepTotals(2.0, loss, False)
    assert module.out.weight.grad is gradient
    assert sync.bytes_sent == 0


def test_bytes_and_waiting_are_counted() -> None:
    def replica(transport: ThreadTransport) -> DataParallel:
        module = nn.Linear(10, 10, bias=False)
        sync = DataParallel(ExactAverager(transport), 10_000)
        sync.attach(module)
        started = sync.bytes_sent
        sync.set_weight(1.0)
        sync.before_backward()
        module(torch.ones(1, 10)).sum().backward()
        sync.before_step(0.0, stop=False)
        assert sync.bytes_sent - started == (100 + 1) * 4 + (3 + 1) * 8
        return sync

    assert all(sync.waited_seconds > 0 for sync in ThreadGroup(2).run(replica))


def test_a_lost_peer_is_an_error() -> None:
    def replica(transport: ThreadTransport) -> None:
        sync = DataParallel(ExactAverager(transport), 100)
        module = nn.Linear(2, 1)
        sync.attach(module)
        if transport.rank == 1:
            return
        sync.set_weight(1.0)
        sync.before_backward()
        module(torch.ones(1, 2)).sum().backward()
        sync.before_step(0.0, stop=False)

    with pytest.raises(PeerLostError, match=r"replicas \[1\] are lost"):
        ThreadGroup(2).run(replica)
