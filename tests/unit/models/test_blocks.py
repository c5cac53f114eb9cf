"""The repeated blocks of a model: which they are, and that what is done to them changes no result."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from raytrain.errors import RecipeError
from raytrain.models import blocks as tested
from raytrain.models.blocks import checkpoint_activations, compile_blocks, repeated_blocks

CPU = torch.device("cpu")
# Dynamo looks at the gradient of every tensor, and silences the warning itself unless it is an error.
dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Block(nn.Module):
    """What a block may have: dropout, a BatchNorm, an argument by name, and a result beside the tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 4 * width)
        self.norm = nn.BatchNorm1d(4 * width)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, int]:
        return x + scale * self.out(self.dropout(torch.tanh(self.norm(self.inner(x))))), 1


class Deep(nn.Module):
    """A model of blocks, whose first one is frozen."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.enter = nn.Linear(4, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.layers[0].requires_grad_(False)
        self.leave = nn.Linear(width, 1)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x, _ = layer(x, scale=self.scale)
        return self.leave(x)[:, 0]


def deep(**sizes: int) -> Deep:
    torch.manual_seed(0)
    return Deep(**sizes)


def linear() -> nn.Linear:
    return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nn.Sequential(linear(), nn.ReLU(), linear()), []),
        (lambda: nn.Sequential(linear(), linear()), ["0", "1"]),
        (lambda: nn.Sequential(linear(), nn.LayerNorm(2)), []),
        (lambda: nn.Sequential(nn.Sequential(linear(), nn.Tanh(), nn.LayerNorm(2)), nn.Flatten()), []),
        (lambda: nn.ModuleList([linear(), nn.LayerNorm(2)]), ["0", "1"]),
        (lambda: nn.ModuleList([linear()]), ["0"]),
        (lambda: nn.ModuleList([nn.ReLU(), nn.ReLU()]), []),
        (lambda: nn.ModuleDict({"a": nn.ModuleList([linear(), linear()])}), ["a.0", "a.1"]),
        (lambda: nn.ModuleList([nn.ModuleList([linear(), nn.LayerNorm(2)]) for _ in range(2)]),
         ["0.0", "0.1", "1.0", "1.1"]),
        (lambda: nn.ModuleList([nn.Sequential(linear(), linear()) for _ in range(2)]), ["0", "1"]),
        (lambda: nn.ModuleList([linear()] * 3), ["0"]),
        (deep, ["layers.0", "layers.1", "layers.2"]),
    ],
)  # fmt: skip
def test_blocks_are_what_repeats(make: Callable[[], nn.Module], expected: list[str]) -> None:
    module = make()
    names = {part: name for name, part in module.named_modules()}
    assert [names[block] for block in repeated_blocks(module)] == expected


def after(module: nn.Module, steps: int = 3) -> dict[str, Tensor]:
    """Return gradients, buffers and losses of some passes, with dropout."""
    torch.manual_seed(1)
    found = {}
    for step in range(steps):
        loss = module(torch.randn(16, 4)).square().mean()
        loss.backward()
        found[f"loss {step}"] = loss.detach()
    found |= {f"gradient of {name}": value.grad for name, value in module.named_parameters() if value.requires_grad}
    return found | {f"buffer {name}": value.clone() for name, value in module.named_buffers()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_recomputing_changes_no_bit() -> None:
    """Nor the generator of random numbers, nor what a BatchNorm remembers, nor names."""
    plain, changed = deep(), deep()
    checkpoint_activations(changed)
    assert list(plain.state_dict()) == list(changed.state_dict())
    assert same(after(plain), after(changed))
    assert torch.equal(plain.eval()(torch.ones(2, 4)), changed.eval()(torch.ones(2, 4)))


def test_recomputing_keeps_less() -> None:
    """What the backward pass keeps grows with the depth, and with recomputing hardly does."""

    def kept(module: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        known = {value.untyped_storage().data_ptr() for value in module.state_dict().values()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(torch.randn(64, 4))
        return sum(size for place, size in sizes.items() if place not in known)

    plain, changed = deep(depth=8), deep(depth=8)
    checkpoint_activations(changed)
    assert kept(changed) < 0.2 * kept(plain)


def test_recomputing_asks_for_blocks() -> None:
    with pytest.raises(RecipeError, match=r"^activation_checkpointing: Linear has no repeated blocks, as an nn.Module"):
        checkpoint_activations(linear())


@pytest.mark.parametrize("make", [deep, lambda: nn.Sequential(linear(), nn.Tanh())])
@dynamo
def test_compiling_changes_no_result(make: Callable[[], nn.Module]) -> None:
    plain = make()
    changed = copy.deepcopy(plain)
    compile_blocks(changed, "aot_eager", CPU)
    assert list(plain.state_dict()) == list(changed.state_dict())
    x = torch.randn(5, 4 if isinstance(plain, Deep) else 2)
    for module in (plain.eval(), changed.eval()):
        module(x).square().sum().backward()
    for one, other in zip(plain.parameters(), changed.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad)


@dynamo
def test_compiled_blocks_can_be_recomputed() -> None:
    compiled, both = deep(), deep()
    compile_blocks(compiled, "aot_eager", CPU)
    compile_blocks(both, "aot_eager", CPU)
    checkpoint_activations(both)
    for one, other in zip(after(compiled).values(), after(both).values(), strict=True):
        torch.testing.assert_close(one, other)


def test_inductor_asks_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        from torch._inductor.exc import InvalidCxxCompiler

        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    with pytest.raises(RecipeError) as caught:
        compile_blocks(linear(), "inductor", CPU)
    assert str(caught.value) == (
        "compile: 'inductor' needs a C++ compiler on every machine that trains on CPUs; install g++ and the headers of "
        "Python, or set compile='' or compile='aot_eager', which needs neither and makes nothing faster"
    )
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(tested.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    with pytest.raises(RecipeError, match="needs /nowhere/Python.h on every machine"):
        compile_blocks(linear(), "inductor", CPU)
