"""What does not move, does not move; and of each block exactly half does."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raytrain.errors import RecipeError
from raytrain.models.blocks import repeated_blocks
from raytrain.models.freezing import HalfFineTuning, freeze
from raytrain.run.checkpoint import list_checkpoints, load_part
from raytrain.tasks.task import Task
from raytrain.testing import ONE_AT_A_TIME, train_here, train_with_threads
from raytrain.training.recipe import TrainRecipe


class Block(nn.Module):
    def __init__(self, linears: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(linears))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for linear in self.linears:
            x = x + torch.tanh(linear(self.norms[0](x)))
        result: torch.Tensor = self.norms[1](x)
        return result


class Net(nn.Module):
    def __init__(self, depth: int, linears: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(Block(linears) for _ in range(depth))
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.body.layers:
            x = layer(x)
        result: torch.Tensor = self.head(x)[:, 0]
        return result


def model(seed: int) -> nn.Module:
    with ONE_AT_A_TIME:
        torch.manual_seed(seed)
        return Net(2, 4)


def data(split: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    points = torch.randn(40, 4, generator=torch.Generator().manual_seed(len(split)))
    return [(point, point.sum()) for point in points]


halves = Task(model=model, data=data, losses=lambda module, batch: (module(batch[0]) - batch[1]).square())


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@given(st.integers(2, 4), st.integers(1, 7), st.integers(0, 100), st.integers(1, 5))
def test_half_of_each_type_of_layer_of_each_block_stands_still(depth: int, linears: int, seed: int, every: int) -> None:
    module, twin = Net(depth, linears), Net(depth, linears)
    half, other = HalfFineTuning(module, seed, every), HalfFineTuning(twin, seed, every)
    optimizer = torch.optim.AdamW(module.parameters())
    turns = []
    for step in range(3 * every):
        half.select(step, optimizer)
        other.select(step, optimizer)
        moving = [name for name, value in module.named_parameters() if value.requires_grad]
        assert moving == [name for name, value in twin.named_parameters() if value.requires_grad]
        turns.append(moving)
        for block in repeated_blocks(module):
            kinds = defaultdict(list)
            for layer in block.modules():
                if own := {value.requires_grad for value in layer.parameters(recurse=False)}:
                    assert len(own) == 1  # a layer moves as a whole
                    kinds[type(layer)].append(own.pop())
            assert all(abs(2 * sum(flags) - len(flags)) <= 1 for flags in kinds.values())
        assert all(value.requires_grad for part in (module.embed, module.head) for value in part.parameters())
    assert all(turns[place] == turns[place // every * every] for place in range(len(turns)))


def test_over_many_rounds_each_layer_moves_half_of_the_time() -> None:
    module = Net(2, 3)
    half = HalfFineTuning(module, 0, 1)
    moved = defaultdict(int)
    for step in range(400):
        half.select(step, torch.optim.SGD(module.parameters(), lr=0.1))
        for name, value in module.named_parameters():
            moved[name] += value.requires_grad
    inside = [count for name, count in moved.items() if "layers" in name]
    assert min(inside) > 160
    assert max(inside) < 240


def recipe(**changes: Any) -> TrainRecipe:
    raw = {"kind": "train", "task": "test_freezing:halves", "steps": 12, "batch": 4, "log": {"loggers": []}}
    return TrainRecipe.parse(raw).with_overrides({"optimizer.lr": 0.02, "schedule.name": "constant", **changes})


def final(folder: Path) -> dict[str, torch.Tensor]:
    saved: dict[str, torch.Tensor] = load_part(list_checkpoints(folder / "checkpoints")[-1], 0)["model"]
    return saved


def test_what_stands_still_keeps_its_bits_and_costs_no_state(tmp_path: Path) -> None:
    run = train_here(recipe(**{"freeze.random_half": True}), tmp_path / "run")
    assert run.failure() is None
    before, after = dict(model(0).named_parameters()), final(run.path)
    still = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert {name.split(".")[3] for name in still} == {"linears", "norms"}
    assert len({name.rpartition(".")[0] for name in still}) == 2 * (2 + 1)
    state = load_part(list_checkpoints(run.checkpoints)[-1], 0)["optimizer"]["state"]
    assert state.keys() == after.keys() - still


def test_a_resumed_run_freezes_as_the_uninterrupted_one_and_so_do_two_workers(tmp_path: Path) -> None:
    changes = {"freeze.random_half": True, "freeze.every": 5, "workers": 2}
    train_with_threads(recipe(**changes), tmp_path / "straight")
    train_with_threads(recipe(**changes, steps=7), tmp_path / "cut")
    run = train_with_threads(recipe(**changes), tmp_path / "cut")
    assert run.failure() is None
    straight, cut = final(tmp_path / "straight"), final(tmp_path / "cut")
    assert all(torch.equal(straight[name], cut[name]) for name in straight)
    train_here(recipe(**changes | {"workers": 1, "batch": 8}), tmp_path / "one")
    for name, value in final(tmp_path / "one").items():
        torch.testing.assert_close(value, straight[name], rtol=1e-4, atol=1e-6)


def test_frozen_patterns_keep_their_bits(tmp_path: Path) -> None:
    run = train_here(recipe(**{"freeze.match": ["embed.*", "*norms*"]}), tmp_path / "run")
    before, after = dict(model(0).named_parameters()), final(run.path)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (name.startswith("embed.") or "norms" in name)


def test_errors_say_what_does_not_fit() -> None:
    with pytest.raises(RecipeError, match=r"^freeze.match: 'embedding.\*' matches no parameter of the model; known: "):
        freeze(Net(1, 1), ["embedding.*"])
    with pytest.raises(RecipeError, match=r"^freeze.match: no parameter of the model is left to train; freeze fewer$"):
        freeze(Net(1, 1), ["*"])
    with pytest.raises(
        RecipeError, match=r"^freeze.random_half: the model has no repeated blocks to freeze a half of$"
    ):
        HalfFineTuning(nn.Linear(1, 1), 0, 0)
    with pytest.raises(
        RecipeError, match=r"expected freeze.random_half = false with an adapter, under which the model is"
    ):
        recipe(**{"freeze.random_half": True, "adapter": "lora"})
