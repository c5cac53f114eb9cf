"""Every optimizer against what the loop, checkpoints and recipes count on, and each by the law that makes it itself."""

import re
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raytrain.optim.arguments import optimizer_options
from raytrain.optim.ema import make_average
from raytrain.optim.optimizers import (
    make_optimizer,
    state_bytes,
)
from raytrain.optim.options import NOT_ELEMENTWISE, OPTIMIZERS, SINGLE_LR, OptimizerOptions, is_elementwise
from raytrain.optim.state import load_state_by_name, state_by_name
from raytrain.registry import resolve
from raytrain.run.checkpoint import CheckpointStore, load_part
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport
from raytrain.tasks.digits import DigitsOptions, digits
from raytrain.training.recipe import TrainRecipe

ROOT = Path(__file__).parents[2]
RATES = {"sgd": 0.3, "prodigy": 1.0}
"""What others than 0.01 to learn with."""
SMALL: dict[str, dict[str, Any]] = {
    "galore": {"rank": 2, "update_proj_gap": 3},
    "fira": {"rank": 2, "update_proj_gap": 3},
    "prodigy": {"d0": 0.01},
}
"""Options for models so small that the shipped ones would do nothing."""

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def made(name: str, module: nn.Module, **changes: Any) -> tuple[Any, OptimizerOptions]:
    constructor = resolve(OPTIMIZERS, name, "optimizer.name")
    options = optimizer_options(name)(name=name, **{**SMALL.get(name, {}), **changes})
    return make_optimizer(constructor, options, module), options


class Model(nn.Module):
    """An embedding, a tall and a wide hidden matrix, vectors and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 4)
        self.tall = nn.Linear(4, 7)
        self.wide = nn.Linear(7, 5)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.tall(self.embedding(x)))
        scores: Tensor = self.head(torch.tanh(self.wide(hidden)))
        return scores[:, 0]


def train(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        x = torch.randint(9, (32,), generator=torch.Generator().manual_seed(step))
        loss = (module(x) - x.float().sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def step_with(optimizer: torch.optim.Optimizer, module: nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    """Step on gradients drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
            parameter.grad = drawn.to(parameter.dtype)
    optimizer.step()


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_the_foreach_kernels_can_be_asked_for() -> None:
    module = Model()
    optimizer, _ = made("adamw", module, foreach=True)
    assert (optimizer.defaults["foreach"], optimizer.defaults["fused"]) == (True, None)
    with pytest.raises(ValueError, match=r"adamw takes optimizer.fused or optimizer.foreach, and not both"):
        made("adamw", module, foreach=True, fused=True)


@every_optimizer
class TestEveryOptimizer:
    def test_it_fits_a_function(self, name: str) -> None:
        module = Model()
        optimizer, _ = made(name, module, lr=RATES.get(name, 0.01))
        losses = train(module, optimizer, 0, 120)
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10])

    def test_it_steps_in_bfloat16(self, name: str) -> None:
        module = Model().bfloat16()
        optimizer, _ = made(name, module, lr=RATES.get(name, 0.01))
        before = copies(module)
        train(module, optimizer, 0, 5)
        for each, value in module.named_parameters():
            assert value.dtype == torch.bfloat16
            assert value.isfinite().all()
            assert not torch.equal(value, before[each])

    def test_it_takes_the_steps_of_its_class_to_the_bit(self, name: str) -> None:
        """What is made is a subclass that does not import torch's compiler."""
        module, other = Model(), Model()
        ours, options = made(name, module)
        names = {parameter: each for each, parameter in module.named_parameters()}
        theirs = resolve(OPTIMIZERS, name, "optimizer.name")(
            [
                {**group, "params": [other.get_parameter(names[parameter]) for parameter in group["params"]]}
                for group in ours.param_groups
            ],
            **options.arguments(),
        )
        assert train(module, ours, 0, 5) == train(other, theirs, 0, 5)
        assert all(map(torch.equal, module.parameters(), other.parameters()))
        ours.load_state_dict(deepcopy(theirs.state_dict()))
        assert train(module, ours, 5, 9) == train(other, theirs, 5, 9)
        assert (type(ours).__name__, type(ours).__module__) == (type(theirs).__name__, type(theirs).__module__)

    def test_it_learns_to_tell_digits_apart(self, name: str) -> None:
        task = digits(DigitsOptions(name="digits", model="mlp", widths=(64, 64)))
        images, labels = task.collate([task.data("train")[place] for place in range(1024)])
        held_out, answers = task.collate([task.data("valid")[place] for place in range(300)])
        module = task.model(0)
        optimizer, _ = made(name, module, lr=RATES.get(name, 0.01))
        average = make_average(module, optimizer, 0.0)
        for step in range(60):
            part = slice(step % 8 * 128, (step % 8 + 1) * 128)
            cross_entropy(module(images[part]), labels[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
        if average:
            module.load_state_dict(average.state_dict())
        assert (module(held_out).argmax(dim=1) == answers).float().mean() > 0.8

    def test_a_recipe_that_names_it_survives_being_written_and_read(self, name: str) -> None:
        recipe = TrainRecipe.parse({"kind": "train", "task": "digits", "optimizer": name})
        assert TrainRecipe.parse(tomllib.loads(recipe.to_toml())) == recipe
        assert TrainRecipe.parse(recipe.to_dict()) == recipe

    def test_a_saved_and_loaded_state_goes_on_to_the_bit(self, name: str, tmp_path: Path) -> None:
        straight = Model()
        optimizer, _ = made(name, straight)
        train(straight, optimizer, 0, 10)
        first = Model()
        optimizer, _ = made(name, first)
        train(first, optimizer, 0, 5)
        state = {"optimizer": state_by_name(optimizer, first)}
        path = CheckpointStore(tmp_path, 1, ExactAverager(LocalTransport())).save(state, {"step": 5, "best_step": 0})
        second = Model()
        second.load_state_dict(first.state_dict())
        optimizer, options = made(name, second)
        load_state_by_name(optimizer, second, load_part(path, 0)["optimizer"], options)
        train(second, optimizer, 5, 10)
        assert all(map(torch.equal, straight.parameters(), second.parameters()))

    def test_a_resumed_run_can_change_its_hyper_parameters_and_groups(self, name: str) -> None:
        module = Model()
        optimizer, _ = made(name, module)
        train(module, optimizer, 0, 2)
        saved = state_by_name(optimizer, module)
        other, options = made(name, module, lr=0.5, groups=[{"match": "head.*"}])
        load_state_by_name(other, module, saved, options)
        rates = {group[key] for group in other.param_groups for key in ("lr", "initial_lr")}
        assert rates == {0.5}
        assert len(other.param_groups) > len(optimizer.param_groups)
        train(module, other, 2, 4)

    def test_weight_decay_leaves_vectors_alone(self, name: str) -> None:
        def after(decay: float, **changes: Any) -> dict[str, Tensor]:
            module = Model()
            module.head.requires_grad_(False)
            for parameter in module.parameters():
                nn.init.constant_(parameter, 0.5)
            optimizer, _ = made(name, module, **{"lr": RATES.get(name, 0.01), "weight_decay": decay, **changes})
            for step in range(2):
                step_with(optimizer, module, step)
            return copies(module)

        without, decayed, all_decayed = after(0.0), after(0.1), after(0.1, decay_1d=True)
        for part in ("tall", "wide"):
            assert torch.equal(without[f"{part}.bias"], decayed[f"{part}.bias"])
            assert not torch.equal(without[f"{part}.weight"], decayed[f"{part}.weight"])
            assert not torch.equal(without[f"{part}.bias"], all_decayed[f"{part}.bias"])
        assert torch.equal(decayed["head.weight"], torch.full((1, 5), 0.5))

    def test_a_rule_can_hold_parameters_where_they_are(self, name: str) -> None:
        if name in SINGLE_LR:
            with pytest.raises(
                ValueError, match=rf"groups.0 \(match = 'tall.\*'\): {name} finds one learning rate for"
            ):
                made(name, Model(), groups=[{"match": "tall.*", "lr_scale": 0.5}])
            return
        module = Model()
        before = copies(module)
        optimizer, _ = made(name, module, groups=[{"match": "tall.*", "lr_scale": 0.0}])
        train(module, optimizer, 0, 3)
        held = {key for key, value in module.named_parameters() if torch.equal(value, before[key])}
        assert held == {"tall.weight", "tall.bias"}

    def test_what_goes_by_elements_goes_by_shards(self, name: str) -> None:
        def after(part: slice) -> Tensor:
            torch.manual_seed(0)
            module = nn.ParameterList([nn.Parameter(torch.randn(8, 5, dtype=torch.float64)[part].clone())])
            optimizer, _ = made(name, module, lr=RATES.get(name, 0.01))
            for step in range(5):
                generator = torch.Generator().manual_seed(step)
                drawn = torch.randn(8, 5, dtype=torch.float64, generator=generator)
                module[0].grad = drawn[part].clone()
                optimizer.step()
            return module[0].detach()

        whole, shards = after(slice(None)), torch.cat([after(slice(3)), after(slice(3, None))])
        assert torch.allclose(whole, shards, rtol=1e-12, atol=1e-14) == is_elementwise(name)

    def test_the_table_tells_its_memory(self, name: str) -> None:
        module = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 1))
        constructor = resolve(OPTIMIZERS, name, "optimizer.name")
        optimizer = make_optimizer(constructor, optimizer_options(name)(name=name), module)
        step_with(optimizer, module)
        measured = state_bytes(optimizer, module)["0.weight"] / 1024**2
        table = (ROOT / "raytrain" / "README.md").read_text()
        row = re.search(rf"^\| `{name}` \|[^|]+\| ([\d.]+) \|[^|]*\|$", table, re.MULTILINE)
        assert row, f"raytrain/README.md has no row for {name}"
        assert float(row[1]) == round(measured, 2)


def test_what_needs_whole_parameters_has_a_name() -> None:
    assert OPTIMIZERS.keys() >= NOT_ELEMENTWISE
    assert SINGLE_LR <= NOT_ELEMENTWISE
    assert not is_elementwise("mine:Optimizer")


def test_nadamw_decays_the_weights_and_not_the_gradient() -> None:
    """Without a gradient a decoupled decay shrinks the weights; a coupled one would move each by about lr."""
    for name, decoupled in (("nadamw", True), ("nadam", False)):
        module = nn.Linear(3, 2, bias=False)
        before = module.weight.detach().clone()
        step_with(made(name, module, lr=0.01, weight_decay=0.5)[0], module, scale=0.0)
        assert torch.allclose(module.weight, before * (1 - 0.01 * 0.5), rtol=1e-6) == decoupled


@given(st.integers(0, 99), st.floats(1e-4, 1e4))
@settings(max_examples=20, deadline=None)
def test_lion_moves_every_number_as_far(seed: int, scale: float) -> None:
    module = nn.Linear(5, 4, dtype=torch.float64)
    before = copies(module)
    step_with(made("lion", module, lr=0.25)[0], module, seed, scale)
    for name, value in module.named_parameters():
        torch.testing.assert_close((value - before[name]).abs(), torch.full_like(value, 0.25))


@given(st.integers(2, 24), st.integers(2, 24), st.integers(0, 99), st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_muon_steps_along_nearly_orthogonal_matrices(rows: int, columns: int, seed: int, scale: float) -> None:
    """The singular values of a gradient that are not tiny beside the largest all become about 1."""
    module = nn.Sequential(nn.Linear(columns, rows, bias=False), nn.Linear(rows, 1))
    before = module[0].weight.detach().clone()
    optimizer, _ = made("muon", module, lr=1.0, weight_decay=0.0, adjust_lr_fn="original")
    step_with(optimizer, module, seed, scale)
    assert module[0].weight.grad is not None
    given = torch.linalg.svdvals(module[0].weight.grad)
    step = (before - module[0].weight.detach()) / max(1.0, rows / columns) ** 0.5
    values = torch.linalg.svdvals(step)[: int((given > 0.1 * given.norm()).sum())]
    assert values.min() > 0.6
    assert values.max() < 1.25


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_is_that_of_torch_but_for_the_rounding_to_bfloat16(adjust: str) -> None:
    ours, theirs = (nn.Sequential(nn.Linear(6, 9, bias=False), nn.Linear(9, 1)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer, _ = made("muon", ours, lr=0.1, adjust_lr_fn=adjust)
    muon = torch.optim.Muon([theirs[0].weight], lr=0.1, adjust_lr_fn=adjust)
    for step in range(3):
        step_with(optimizer, ours, step)
        step_with(muon, theirs, step)
    torch.testing.assert_close(ours[0].weight, theirs[0].weight, rtol=0.05, atol=0.01)


def test_muon_leaves_all_but_hidden_matrices_to_adamw() -> None:
    ours, theirs = Model(), Model()
    optimizer, _ = made("muon", ours, lr=0.02, weight_decay=0.1)
    adamw, _ = made("adamw", theirs, lr=0.02, weight_decay=0.1, betas=[0.9, 0.95])
    for step in range(4):
        step_with(optimizer, ours, step)
        step_with(adamw, theirs, step)
    same = {name for name, value in ours.named_parameters() if torch.equal(value, theirs.get_parameter(name))}
    assert {name for name, _ in ours.named_parameters()} - same == {"tall.weight", "wide.weight"}
    moved = (ours.wide.weight - Model().wide.weight).square().mean().sqrt() / 4
    assert 0.5 < moved / (0.2 * 0.02) < 1.5, "match_rms_adamw: a step moves each number by about 0.2 lr"


@pytest.mark.parametrize("name", ["galore", "fira"])
class TestLowRank:
    def test_a_rank_that_saves_nothing_is_adamw_to_the_bit(self, name: str) -> None:
        ours, theirs = Model(), Model()
        optimizer, _ = made(name, ours, lr=0.02, weight_decay=0.1, rank=5)
        adamw, _ = made("adamw", theirs, lr=0.02, weight_decay=0.1)
        for step in range(4):
            step_with(optimizer, ours, step)
            step_with(adamw, theirs, step)
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))

    def test_the_state_of_a_matrix_is_as_small_as_its_projection(self, name: str) -> None:
        module = Model()
        optimizer, _ = made(name, module)
        step_with(optimizer, module)
        shapes = {key: value.shape for key, value in optimizer.state[module.tall.weight].items() if key != "step"}
        assert shapes["exp_avg"] == shapes["exp_avg_sq"] == (2, 7)
        assert shapes["basis"] == (4, 2)
        sizes = state_bytes(optimizer, module)
        assert sizes["tall.weight"] <= 4 * (2 * 2 * 7 + 2 * 4 + 1)
        assert sizes["embedding.weight"] == 4 * (2 * 9 * 4 + 1)

    def test_a_basis_lasts_as_long_as_it_should(self, name: str) -> None:
        module = Model()
        optimizer, _ = made(name, module)
        bases = []
        for step in range(7):
            step_with(optimizer, module, step)
            bases.append(optimizer.state[module.wide.weight]["basis"].clone())
        turned = [step for step in range(1, 7) if not torch.equal(bases[step], bases[step - 1])]
        assert turned == [3, 6]

    def test_a_resumed_run_can_change_the_rank(self, name: str) -> None:
        module = Model()
        optimizer, _ = made(name, module)
        train(module, optimizer, 0, 4)
        for rank in (3, 9, 2):
            saved = state_by_name(optimizer, module)
            optimizer, options = made(name, module, rank=rank)
            load_state_by_name(optimizer, module, saved, options)
            train(module, optimizer, 4, 6)
            state = optimizer.state[module.tall.weight]
            assert ("basis" in state) == (rank < 4)
            assert state["exp_avg"].shape == ((rank, 7) if rank < 4 else (7, 4))


@given(st.integers(2, 9), st.integers(2, 9), st.data())
@settings(max_examples=30, deadline=None)
def test_galore_is_adam_on_the_factor_of_its_basis(rows: int, columns: int, data: st.DataObject) -> None:
    """While the basis P stays, W = W0 + P V with Adam on V: the gradient of V is that of W, projected."""
    rank = data.draw(st.integers(1, min(rows, columns) - 1))
    module = nn.Sequential(nn.Linear(columns, rows, bias=False), nn.Linear(rows, 1)).double()
    start = module[0].weight.detach().clone()
    optimizer, _ = made("galore", module, rank=rank, update_proj_gap=99, scale=1.0, lr=0.1)
    factor = nn.Parameter(torch.zeros(rank, max(rows, columns), dtype=torch.float64))
    adam = torch.optim.Adam([factor], lr=0.1)
    for step in range(4):
        step_with(optimizer, module, step)
        basis = optimizer.state[module[0].weight]["basis"]
        gradient = module[0].weight.grad
        assert gradient is not None
        factor.grad = basis.T @ (gradient.T if rows >= columns else gradient)
        adam.step()
        moved = basis @ factor.detach()
        expected = start + (moved.T if rows >= columns else moved)
        torch.testing.assert_close(module[0].weight.detach(), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64))


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_fira_is_galore_with_the_scaled_rest(seed: int) -> None:
    module, low = (nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 1)).double() for _ in range(2))
    low.load_state_dict(module.state_dict())
    fira, _ = made("fira", module, update_proj_gap=99, scale=1.0, lr=1.0)
    galore, _ = made("galore", low, update_proj_gap=99, scale=1.0, lr=1.0)
    norms = []
    for step in range(6):
        before = module[0].weight.detach().clone(), low[0].weight.detach().clone()
        step_with(fira, module, seed + step, scale=1 + step)
        step_with(galore, low, seed + step, scale=1 + step)
        steps = before[0] - module[0].weight.detach(), before[1] - low[0].weight.detach()
        basis, gradient = fira.state[module[0].weight]["basis"], module[0].weight.grad
        assert gradient is not None
        rest = steps[0] - steps[1]
        torch.testing.assert_close(basis.T @ rest, torch.zeros(2, 8, dtype=torch.float64), atol=1e-9, rtol=0)
        outside = gradient - basis @ (basis.T @ gradient)
        scale = (basis.T @ steps[1]).norm(dim=0) / (basis.T @ gradient).norm(dim=0)
        norms.append(rest.norm().item())
        torch.testing.assert_close(rest / rest.norm(), outside * scale / (outside * scale).norm(), rtol=1e-5, atol=1e-7)
    assert all(after <= 1.01 * before * (1 + 1e-9) for before, after in zip(norms, norms[1:], strict=False))
    scaled = outside * scale
    assert norms[-1] == pytest.approx(min(scaled.norm().item(), 1.01 * norms[-2]), rel=1e-5)


@given(st.floats(1e-3, 1e3), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_prodigy_does_not_see_the_scale_of_the_loss(scale: float, seed: int) -> None:
    one, other = nn.Linear(3, 2, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)
    other.load_state_dict(one.state_dict())
    first, second = (made("prodigy", module, eps=0.0)[0] for module in (one, other))
    for step in range(5):
        step_with(first, one, seed + step)
        step_with(second, other, seed + step, scale)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-6)


def test_prodigy_finds_its_rate_from_any_start() -> None:
    found = []
    for d0 in (1e-8, 1e-6, 1e-4):
        module = Model()
        optimizer, _ = made("prodigy", module, d0=d0)
        distances = []
        for step in range(200):
            train(module, optimizer, step, step + 1)
            distances.append(optimizer.param_groups[0]["d"])
        assert distances == sorted(distances)
        found.append(distances[-1])
    assert min(found) > 1e-3
    assert max(found) < 3 * min(found)


def test_sgdsai_takes_its_ratio_from_the_first_gradient_that_is_not_zero() -> None:
    module = nn.Linear(6, 5, dtype=torch.float64)
    optimizer, _ = made("sgdsai", module, weight_decay=0.0)
    before = copies(module)
    step_with(optimizer, module, scale=0.0)
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())
    step_with(optimizer, module, seed=1, scale=1e-3)
    for parameter in module.parameters():
        gradient = parameter.grad
        assert gradient is not None
        expected = gradient.norm() / gradient.std()
        torch.testing.assert_close(optimizer.state[parameter]["ratio"], expected, rtol=1e-4, atol=0)
        assert expected > 0.8 * parameter.numel() ** 0.5
    first = [optimizer.state[parameter]["ratio"].clone() for parameter in module.parameters()]
    step_with(optimizer, module, seed=2)
    assert first == [optimizer.state[parameter]["ratio"] for parameter in module.parameters()]


@given(st.floats(0.5, 0.95), st.lists(st.floats(0.1, 1.0), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_schedulefree_evaluates_the_weighted_average(beta: float, rates: list[float]) -> None:
    """The average x of z_1, z_2, ..., each weighed by the square of the largest learning rate so far."""
    module = nn.Linear(3, 2, dtype=torch.float64)
    optimizer, _ = made("schedulefree", module, betas=[beta, 0.99])
    average = make_average(module, optimizer, 0.0)
    assert average is not None
    total, weights = torch.zeros(2, 3, dtype=torch.float64), 0.0
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        step_with(optimizer, module, step)
        weight = max(rates[: step + 1]) ** 2
        total, weights = total + weight * optimizer.state[module.weight]["z"], weights + weight
        live = copies(module)
        with average.average_parameters():
            torch.testing.assert_close(module.weight.detach(), total / weights)
        assert all(torch.equal(value, live[name]) for name, value in module.named_parameters())
