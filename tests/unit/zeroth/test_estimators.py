"""Probing: the slope is right, nothing moves, and what is replaced is all that the model reads."""

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raytrain.errors import RecipeError
from raytrain.seeds.directions import Directions
from raytrain.seeds.kernels.kernel import ScaledDirection, load_kernel
from raytrain.tensors import at_least_float32
from raytrain.zeroth.estimators import directional_derivative, projected_gradient, reject_outliers
from raytrain.zeroth.perturbed import PerturbedModel

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Odd(nn.Module):
    """A model with all that goes wrong: ties, a table that is returned, a weight used from outside, a nested owner."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(500, 16, padding_idx=499)
        self.places = Table(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
        self.outer = Nested(16)
        self.head = nn.Linear(16, 500, bias=False)
        self.head.weight = self.words.weight
        self.bare = nn.Parameter(torch.randn(16))
        self.used_by_others = nn.Linear(16, 16)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(words.shape[1])
        y, _ = self.attention(x, x, x)
        x = self.outer(self.encoder(x + y))
        x = torch.nn.functional.linear(x, self.used_by_others.weight) * self.bare
        return self.head(x)


class Table(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(40, width))

    def forward(self, count: int) -> Tensor:
        return self.table[:count]


class Nested(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(width))
        self.inner = nn.Linear(width, width)
        self.again = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.inner(x) * self.gain)) * self.gain


def loss_of(module: nn.Module) -> Callable[[], Tensor]:
    words = torch.arange(60).view(3, 20) % 37

    def loss() -> Tensor:
        torch.manual_seed(7)
        return at_least_float32(module(words)).logsumexp(-1).mean()

    return loss


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def moved_by_hand(module: nn.Module, space: Directions, seed: int, scale: float, loss: Callable[[], Tensor]) -> Tensor:
    before = copies(module)
    space.add_direction(seed, scale)
    value = loss()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(before[name])
    return value


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_probe_sees_what_a_move_would_make(dtype: torch.dtype, training: bool) -> None:
    module = Odd().to(dtype).train(training)
    space, loss = Directions.of(dict(module.named_parameters())), loss_of(module)
    probe, before, plain = PerturbedModel(module, space), copies(module), loss()
    for seed, scale in ((1, 0.01), (2, -0.3), (1, 0.0)):
        found = probe.loss_at(seed, scale, loss)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        torch.testing.assert_close(found, moved_by_hand(module, space, seed, scale, loss), rtol=1e-6, atol=1e-6)
        assert scale == 0 or found != plain
    assert torch.equal(loss(), plain)


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"distribution": "gaussian"}, {"blocks": {"head.weight": 1}}])
@torch.no_grad()
def test_a_probe_moves_what_the_space_says(options: dict[str, object]) -> None:
    module = Odd().eval()
    some = {name: value for name, value in module.named_parameters() if "encoder" not in name}
    space, loss = Directions.of(some, **options), loss_of(module)  # type: ignore[arg-type]
    probe = PerturbedModel(module, space)
    for seed in (1, 2, 3):
        found = probe.loss_at(seed, 0.1, loss)
        torch.testing.assert_close(found, moved_by_hand(module, space, seed, 0.1, loss), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_two_hundred_probes_leave_every_bit_also_when_the_loss_raises(dtype: torch.dtype) -> None:
    module = Odd().to(dtype).eval()
    before, loss = copies(module), loss_of(module)
    probe = PerturbedModel(module, Directions.of(dict(module.named_parameters())))

    def failing() -> Tensor:
        raise ArithmeticError("on purpose")

    handle = module.outer.inner.register_forward_hook(lambda *_: failing())
    with pytest.raises(ArithmeticError):
        probe.loss_at(0, 1.0, loss)
    handle.remove()
    for seed in range(100):
        projected_gradient(loss, probe, seed, 1e-3)
    for late in (module.outer.again, module.head):
        handle = late.register_forward_pre_hook(lambda *_: failing())
        with pytest.raises(ArithmeticError):
            probe.loss_at(0, 1.0, loss)
        handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(isinstance(value, nn.Parameter) for value in module.parameters())
    assert module.words.padding_idx == 499


class Quadratic(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layer = nn.Linear(7, 5, bias=False, dtype=torch.float64)
        self.layer.weight.data = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        self.x = torch.randn(20, 7, generator=generator, dtype=torch.float64)

    def forward(self) -> Tensor:
        return self.layer(self.x).square().sum()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**64 - 1), st.floats(1e-3, 10), st.sampled_from(["rademacher", "gaussian"]))
def test_the_slope_of_a_quadratic_is_its_derivative(seed: int, eps: float, mode: str) -> None:
    module = Quadratic(seed % 1000)
    space = Directions.of({"layer.weight": module.layer.weight}, mode)  # type: ignore[arg-type]
    probe = PerturbedModel(module, space)
    module().backward()
    direction = torch.zeros_like(module.layer.weight)
    space.add_to(space.slices[0], direction, seed, 1.0)
    exact = float((module.layer.weight.grad * direction).sum())
    curvature = float((module.x @ direction.T.detach()).square().sum())
    with torch.no_grad():
        at_rest = float(module())
        both = projected_gradient(module, probe, seed, eps)
        ahead = projected_gradient(module, probe, seed, eps, base_loss=at_rest)
        along = directional_derivative(module, probe, seed)
    size = abs(exact) + (at_rest + curvature * eps * eps) / eps
    assert math.isclose(both.value, exact, rel_tol=1e-9, abs_tol=1e-6 * size)  # directions are scaled in float32
    assert math.isclose(along.value, exact, rel_tol=1e-9, abs_tol=1e-9 * size)
    assert math.isclose(ahead.value, exact + eps * curvature, rel_tol=1e-6, abs_tol=1e-6 * size)
    assert both.loss >= at_rest - 1e-9 * size
    assert ahead.loss == along.loss == at_rest


@torch.no_grad()
def test_the_exact_slope_is_the_limit_of_differences() -> None:
    module = Odd().double().eval()
    probe = PerturbedModel(module, Directions.of(dict(module.named_parameters())))
    for seed in (3, 4):
        exact, near = (
            directional_derivative(loss_of(module), probe, seed),
            projected_gradient(loss_of(module), probe, seed, 1e-5),
        )
        assert math.isclose(exact.value, near.value, rel_tol=1e-4, abs_tol=1e-6)


def test_only_looked_up_rows_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    kernel = load_kernel("reference")
    move = kernel.axpy

    def counted(direction: ScaledDirection, base: Tensor, out: Tensor, rows: Tensor | None) -> None:
        drawn.append(out.numel())
        move(direction, base, out, rows)

    module = nn.Embedding(1000, 8)
    probe = PerturbedModel(module, Directions.of({"weight": module.weight}, kernel=kernel))
    monkeypatch.setattr(kernel, "axpy", counted)
    with torch.no_grad():
        probe.loss_at(1, 0.1, lambda: module(torch.tensor([[3, 999, 3], [0, 0, 1]])).sum())
    assert set(drawn) == {4 * 8}


def test_a_space_of_another_model_is_refused() -> None:
    with pytest.raises(RecipeError, match="directions: bias is not a parameter of the module"):
        PerturbedModel(nn.Linear(3, 3), Directions.of({"bias": torch.zeros(3)}))


@dataclasses.dataclass
class Output:
    value: Tensor


class Awkward(nn.Module):
    """A layer with two types, one that is shared and called inside another, a table of int32, an odd output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.shared = nn.Linear(8, 8)
        self.outer = Borrower(self.shared)
        self.table = nn.Embedding(100, 8)
        self.mixed = Mixed()
        self.odd = OddOutput()

    def forward(self) -> Tensor:
        x = self.table(torch.tensor([[3, 7, 3]], dtype=torch.int32))
        return self.odd(self.mixed(self.outer(self.shared(x)))).value.square().sum()


class Borrower(nn.Module):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.shared(x)) @ self.weight


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(8, dtype=torch.bfloat16))
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight) * self.gain.float()


class OddOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))
        self.after = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Output:
        return Output(self.weight[: x.shape[1]] * self.after(x))


@torch.no_grad()
def test_layers_inside_others_types_side_by_side_and_odd_outputs() -> None:
    module = Awkward()
    space = Directions.of(dict(module.named_parameters()))
    probe = PerturbedModel(module, space)
    for seed in (1, 2):
        found = probe.loss_at(seed, 0.1, module)
        torch.testing.assert_close(found, moved_by_hand(module, space, seed, 0.1, module), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [[1200], [-1], [10**9], []])
@torch.no_grad()
def test_tokens_that_are_not_in_a_table_are_what_they_are_to_torch(tokens: list[int]) -> None:
    module = nn.Embedding(1000, 8)
    probe = PerturbedModel(module, Directions.of({"weight": module.weight}))
    probe.loss_at(0, 0.1, lambda: module(torch.tensor([5])).sum())

    def loss() -> Tensor:
        return module(torch.tensor(tokens, dtype=torch.long)).sum()

    if not tokens:
        assert probe.loss_at(0, 0.1, loss) == 0
        return
    with pytest.raises(IndexError):
        probe.loss_at(0, 0.1, loss)
    assert isinstance(module.weight, nn.Parameter)


class Graph(nn.Module):
    """A layer on a graph, whose edges are a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.edges = torch.eye(4).to_sparse()
        self.register_buffer("weights", torch.eye(4).to_sparse_csr() * 2, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.weights, torch.sparse.mm(self.edges, self.layer(x))).sum()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@torch.no_grad()
def test_a_model_may_have_sparse_tensors() -> None:
    module, x = Graph(), torch.randn(4, 3)
    space = Directions.of(dict(module.named_parameters()))
    found = PerturbedModel(module, space).loss_at(1, 0.1, lambda: module(x))
    assert torch.equal(found, moved_by_hand(module, space, 1, 0.1, lambda: module(x)))


@torch.no_grad()
def test_a_parameter_that_is_kept_elsewhere_is_named() -> None:
    module = nn.Linear(3, 3)
    kept = [module.weight]
    probe = PerturbedModel(module, Directions.of(dict(module.named_parameters())))
    with pytest.raises(RecipeError, match="directions: weight is kept outside of its layer"):
        probe.loss_at(0, 0.1, lambda: (module(torch.ones(2, 3)) @ kept[0]).sum())  # noqa: PLW0108 - read in each call


@torch.no_grad()
def test_buffers_stay_and_copies_of_the_model_are_plain() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    probe = PerturbedModel(module, Directions.of(dict(module.named_parameters())))
    before, x = copies(module), torch.randn(5, 3)
    projected_gradient(lambda: module(x).square().sum() + module[0].weight.sum(), probe, 1, 0.1)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    other = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert torch.equal(other.eval()(x), module.eval()(x))


class Counting(nn.Module):
    """A layer that writes into one buffer, puts another one in the place of a second, and has one that is expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("none", None)
        self.register_buffer("same", torch.ones(1).expand(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x
        self.mean = 0.9 * self.mean + x
        self.none = self.layer.weight[0].detach() if self.none is None else self.none
        return self.layer(x + self.seen + self.mean + self.same + self.none).sum()


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_every_probe_sees_the_same_buffers(training: bool) -> None:
    module = Counting().train(training)
    probe = PerturbedModel(module, Directions.of(dict(module.named_parameters())))
    before, places, x = copies(module), dict(module.named_buffers()), torch.randn(3)
    found = {float(probe.loss_at(1, 0.1, lambda: module(x))) for _ in range(3)}
    assert len(found) == 1
    assert len({float(probe.loss(lambda: module(x))) for _ in range(3)}) == 1
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.none is None
    assert all(value is places[name] for name, value in module.named_buffers())


class Keeper(nn.Module):
    """Two layers in the same memory, the first of which leaves its weight where the loss finds it."""

    def __init__(self, alias: Callable[[nn.Linear], Tensor]) -> None:
        super().__init__()
        self.first, self.second = (Keeping(alias) for _ in range(2))

    def forward(self) -> Tensor:
        x = self.second(self.first(torch.ones(2, 3)))
        return x.square().sum() + self.first.last[0].square().sum()


class Keeping(nn.Linear):
    def __init__(self, alias: Callable[[nn.Linear], Tensor]) -> None:
        super().__init__(3, 3)
        self.alias = alias

    def forward(self, x: Tensor) -> Tensor:
        self.last = (self.alias(self),)
        return super().forward(x)


@pytest.mark.parametrize(
    "alias",
    [
        lambda layer: layer.weight,
        lambda layer: layer.weight.t(),
        lambda layer: layer.weight.detach(),
        lambda layer: layer.weight[0],
        lambda layer: layer.bias,
    ],
)
@torch.no_grad()
def test_a_weight_that_a_layer_leaves_behind_is_the_moved_one(alias: Callable[[nn.Linear], Tensor]) -> None:
    module = Keeper(alias)
    space = Directions.of(dict(module.named_parameters()))
    probe = PerturbedModel(module, space)
    for seed in (1, 2):
        found = probe.loss_at(seed, 0.1, module)
        torch.testing.assert_close(found, moved_by_hand(module, space, seed, 0.1, module), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_parameters_may_share_their_memory_with_some_that_stand_still() -> None:
    module, flat = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)), torch.randn(18)
    module[0].weight.data, module[1].weight.data = flat[:9].view(3, 3), flat[9:].view(3, 3)
    space = Directions.of({"1.weight": module[1].weight})
    x = torch.ones(2, 3)
    found = PerturbedModel(module, space).loss_at(1, 0.1, lambda: module(x).square().sum())
    wanted = moved_by_hand(module, space, 1, 0.1, lambda: module(x).square().sum())
    torch.testing.assert_close(found, wanted)


@given(st.lists(st.floats(), max_size=80), st.integers(1, 3), st.sampled_from([0.0, 3.0]))
def test_outliers_are_told_by_the_median_of_their_own_block(values: list[float], blocks: int, threshold: float) -> None:
    """All at once or one after the other, history never grows, and what is used is finite and as it was."""
    slopes = list(enumerate(values))
    used, recent = reject_outliers(slopes, [[]] * blocks, threshold)
    finite = {seed: value for seed, value in slopes if math.isfinite(value)}
    if not threshold:
        assert dict(used) == finite
    assert used.items() <= finite.items()
    for block in range(blocks):
        sizes = sorted(abs(value) for seed, value in finite.items() if value and seed % blocks == block)
        assert sorted(recent[block]) == sizes
        far = threshold * sizes[(len(sizes) - 1) // 2] / 0.674489750196 if sizes and threshold else math.inf
        for seed, value in finite.items():
            if seed % blocks == block and not math.isclose(abs(value), far, rel_tol=1e-9):
                assert (seed in used) == (abs(value) <= far)
    one_by_one: list[list[float]] = [[] for _ in range(blocks)]
    for slope_of_one in slopes:
        _, one_by_one = reject_outliers([slope_of_one], one_by_one, threshold)
    assert one_by_one == [sizes[-64:] for sizes in recent]
