"""Every adapter: it starts as the model, moves nothing else, goes into few tensors, and merges into the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raytrain.errors import CheckpointError, RecipeError
from raytrain.models import options as declared
from raytrain.models.adapters import inject_adapter, mark_untrained, merge_adapter, peft_config
from raytrain.models.options import ADAPTERS, AdapterOptions
from raytrain.recipe import Options
from raytrain.run.checkpoint import list_checkpoints, load_part
from raytrain.run.directory import RunDirectory
from raytrain.tasks.task import Task
from raytrain.testing import train_here
from raytrain.training.recipe import TrainRecipe
from raytrain.training.results import load_best

WIDTH = 16
OPTIONS: dict[str, dict[str, Any]] = {  # sizes that fit layers of 16 x 16
    "miss": {"r": 8},
    "shira": {"r": 2},
    "oft": {"oft_block_size": 8},
}
NAMES = [name for name in ADAPTERS if name != "none"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.outer = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(x + self.outer(torch.tanh(self.inner(x))))
        return result


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.classifier = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        result: torch.Tensor = self.classifier(x)
        return result


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Net()


def data(split: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    points = torch.randn(60 if split == "train" else 20, WIDTH, generator=torch.Generator().manual_seed(len(split)))
    return [(point, (point[0] > 0).long() + (point[1] > 0.5)) for point in points]


def losses(module: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")


blocks_task = Task(model=model, data=data, losses=losses)


class Other(Options):
    width: int = 1


def another_base(options: Other) -> Task:
    return Task(model=lambda seed: model(seed + options.width), data=data, losses=losses)


def chosen(name: str) -> AdapterOptions:
    return declared.ADAPTER_OPTIONS[name](name=name, **OPTIONS.get(name, {}))


def recipe(name: str, **changes: Any) -> TrainRecipe:
    raw = {"kind": "train", "task": "test_adapters:blocks_task", "adapter": {"name": name, **OPTIONS.get(name, {})}}
    base = {"steps": 40, "batch": 16, "optimizer.lr": 0.02, "log.loggers": [], "evaluation.every": 20}
    return TrainRecipe.parse(raw).with_overrides(base | changes)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_as_the_model_and_moves_only_itself_and_the_head(name: str) -> None:
    module, plain = model(0), model(0)
    elsewhere = inject_adapter(module, chosen(name), seed=0)
    x = torch.randn(8, WIDTH)
    torch.testing.assert_close(module(x), plain(x), rtol=1e-5, atol=1e-5)
    trained = {key for key, value in module.named_parameters() if value.requires_grad}
    assert {"classifier.weight", "classifier.bias"} < trained
    assert trained | elsewhere == dict(module.named_parameters()).keys()
    before = {key: module.get_parameter(key).clone() for key in elsewhere}
    optimizer = torch.optim.Adam([value for value in module.parameters() if value.requires_grad], lr=0.01)
    for _ in range(3):
        module(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(module.get_parameter(key), value) for key, value in before.items())
    assert not torch.allclose(module(x), plain(x))


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_saves_little_and_merges_into_a_plain_model(name: str, tmp_path: Path) -> None:
    run = train_here(recipe(name), tmp_path / "run")
    assert run.failure() is None
    saved = load_part(list_checkpoints(run.checkpoints)[-1], 0)["model"]
    assert not any("base_layer" in key for key in saved)
    losses_measured = [row["valid"]["loss"] for row in rows_of(run)]
    assert losses_measured[-1] < losses_measured[0]
    assert load_best(run.path, {}).evaluate()["loss"] == pytest.approx(min(losses_measured), rel=1e-5)

    module = model(0)
    inject_adapter(module, chosen(name), seed=0)
    module.load_state_dict(saved, strict=False)
    x = torch.randn(50, WIDTH)
    with torch.no_grad():
        adapted = module.eval()(x)
        merge_adapter(module)
        torch.testing.assert_close(module(x), adapted, rtol=1e-4, atol=1e-5)
    assert module.state_dict().keys() == model(0).state_dict().keys()


def rows_of(run: RunDirectory) -> list[dict[str, Any]]:
    from raytrain.run.rows import read_jsonl

    return [row for row in read_jsonl(run.metrics) if "valid" in row]


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    train_here(recipe(name, steps=15, **{"schedule.name": "constant"}), tmp_path / "cut")
    straight = train_here(recipe(name, steps=20, **{"schedule.name": "constant"}), tmp_path / "straight-20")
    cut = train_here(recipe(name, steps=20, **{"schedule.name": "constant"}), tmp_path / "cut")
    assert cut.failure() is None
    one, other = (load_part(list_checkpoints(run.checkpoints)[-1], 0)["model"] for run in (straight, cut))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_another_model_beneath_an_adapter_is_noticed(tmp_path: Path) -> None:
    train_here(recipe("lora", task={"name": "test_adapters:another_base"}, steps=2), tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"this checkpoint is of an adapter on another base model: the weights at"
    ):
        load_best(tmp_path / "run", {"task.width": 2}).evaluate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"r": 0},
            r"adapter: lora does not fit the model: `r` should be a positive integer value",
        ),
        pytest.param(
            {"name": "randlora", "r": 0},
            r"adapter: randlora does not fit the model: division by zero",
            marks=pytest.mark.filterwarnings("ignore:Initializing zero-element"),
        ),
        ({"name": "randlora", "r": -1}, r"adapter: expected adapter.r of 0 or more; got -1"),
        ({"target_modules": "[("}, r"adapter: lora does not fit the model: unterminated character set"),
        ({"target_modules": ["norm"]}, r"adapter: lora does not fit the model: Target module LayerNorm.* is not suppo"),
        ({"rank": 4}, r"adapter.rank: no such field; known: .*, r, rank_pattern"),
        ({"name": "lorra"}, r"adapter.name: no such name 'lorra'; did you mean lora"),
        ({"target_modules": ["query"]}, r"adapter: lora does not fit the model: .*query.* not found in the base model"),
        ({"name": "prefix"}, r"adapter.name: no such name 'prefix'; "),
    ],
)
def test_errors_say_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    section = {"name": "lora", **change}
    with pytest.raises(RecipeError, match=message):
        inject_adapter(model(0), TrainRecipe.parse({"kind": "train", "task": "digits", "adapter": section}).adapter, 0)


def test_a_fault_that_is_not_the_recipes_is_not_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("the GPU is full")

    monkeypatch.setattr("peft.inject_adapter_in_model", fail)
    with pytest.raises(torch.OutOfMemoryError, match="^the GPU is full$"):
        inject_adapter(model(0), chosen("lora"), 0)


def test_a_model_without_blocks_must_name_its_layers() -> None:
    with pytest.raises(RecipeError, match=r"adapter.target_modules: the model has no linear layers inside repeated bl"):
        inject_adapter(nn.Sequential(nn.Linear(2, 2)), chosen("lora"), 0)


def test_new_parameters_are_trained_or_at_least_saved() -> None:
    module = model(0)
    mark_untrained(module.layers[0].norm.parameters())
    mark_untrained(module.layers[1].norm.parameters())
    module.layers[1].norm.requires_grad_(False)  # freeze.match
    elsewhere = inject_adapter(module, chosen("lora"), 0)
    trained = {key for key, value in module.named_parameters() if value.requires_grad}
    assert {key for key in trained if "lora" not in key} == {
        "layers.0.norm.weight", "layers.0.norm.bias", "classifier.weight", "classifier.bias",
    }  # fmt: skip
    assert not any("norm" in key for key in elsewhere), "no folder has them"


def test_patterns_of_what_is_trained_beside_an_adapter_must_fit() -> None:
    options = declared.ADAPTER_OPTIONS["lora"]
    module = model(0)
    inject_adapter(module, options(name="lora", modules_to_save=("*norm*", "score*")), 0)
    trained = {key for key, value in module.named_parameters() if value.requires_grad}
    assert {key.split(".")[2] for key in trained if "lora" not in key} == {"norm"}
    with pytest.raises(
        RecipeError, match=r"^adapter.modules_to_save: 'clasifier\*' matches no parameter of the model; did y"
    ):
        inject_adapter(model(0), options(name="lora", modules_to_save=("clasifier*",)), 0)


@pytest.mark.parametrize("name", ["none", "lora"])
def test_options_that_a_recipe_has_written_out_are_read_again(name: str) -> None:
    written = AdapterOptions(name=name).model_dump()
    config = peft_config(AdapterOptions.model_validate(written))
    assert (config is None) == (name == "none")
