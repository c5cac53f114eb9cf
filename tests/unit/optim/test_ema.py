import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raytrain.errors import RecipeError
from raytrain.optim.ema import Ema
from raytrain.run.checkpoint import list_checkpoints, load_part
from raytrain.run.directory import RunDirectory
from raytrain.testing import train_here, train_with_threads
from raytrain.training.recipe import TrainRecipe
from raytrain.training.results import collect_result, load_best


def test_the_average_is_the_recursion_of_the_definition() -> None:
    module = nn.Linear(3, 2)
    ema, decay = Ema(module, 0.9), 0.9
    expected = {name: value.detach().clone() for name, value in module.named_parameters()}
    for step in range(1, 40):
        for value in module.parameters():
            value.data.add_(torch.randn_like(value))
        ema.update(step)
        kept = min(decay, step / (step + 9))
        for name, value in module.named_parameters():
            expected[name] = kept * expected[name] + (1 - kept) * value.detach()
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_the_module_holds_the_average_inside_the_block_only() -> None:
    module = nn.Linear(3, 2)
    ema = Ema(module, 0.5)
    first = module.weight.detach().clone()
    module.weight.data.add_(1)
    live = module.weight.detach().clone()
    before = module.weight.data_ptr()
    with contextlib.suppress(ZeroDivisionError), ema.average_parameters():
        assert torch.equal(module.weight, first)
        1 / 0  # noqa: B018 - an error inside the block
    assert torch.equal(module.weight, live)
    assert module.weight.data_ptr() == before


def test_what_was_frozen_begins_with_its_parameter() -> None:
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    saved = Ema(module, 0.5).state_dict()
    module.bias.requires_grad_(True)
    module.bias.data.fill_(3.0)
    ema = Ema(nn.Linear(3, 2), 0.5)
    ema.load_state_dict(saved)
    assert torch.equal(ema.state_dict()["weight"], module.weight)
    ema = Ema(module, 0.5)
    ema.load_state_dict(saved)
    assert ema.state_dict()["bias"].tolist() == [3.0, 3.0]


def test_tied_parameters_are_averaged_once() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    ema = Ema(module, 0.5)
    module[0].weight.data.add_(1)
    ema.update(10)
    with ema.average_parameters():
        assert torch.equal(module[0].weight, module[1].weight)


def schedulefree(**changes: Any) -> TrainRecipe:
    base = {"kind": "train", "task": "raytrain.testing:tiny", "optimizer": "schedulefree", "seed": 3, "steps": 8}
    more = {"schedule.name": "constant", "evaluation.every": 2, "checkpoint.every": 2, "log.loggers": [], "batch": 8}
    return TrainRecipe.parse(base).with_overrides({**more, **changes})


def state(run: RunDirectory) -> dict[str, torch.Tensor]:
    saved = load_part(list_checkpoints(run.checkpoints)[-1], 0)
    return {**saved["model"], **{f"average {name}": value for name, value in saved["ema"].items()}}


def equal(one: RunDirectory, other: RunDirectory) -> bool:
    first, second = state(one), state(other)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_an_optimizer_that_averages_is_evaluated_with_its_average(tmp_path: Path) -> None:
    run = train_here(schedulefree(), tmp_path / "run")
    saved = state(run)
    assert not torch.equal(saved["out.weight"], saved["average out.weight"])
    best = collect_result(schedulefree(), run, None).best
    evaluated = load_best(run.path, {}).evaluate()
    assert (evaluated["step"], evaluated["loss"]) == (best["step"], best["value"])


def test_its_run_goes_on_to_the_bit_whether_or_not_it_is_evaluated(tmp_path: Path) -> None:
    straight = train_here(schedulefree(), tmp_path / "straight")
    rare = train_here(schedulefree(**{"evaluation.every": 0, "checkpoint.every": 0}), tmp_path / "rare")
    train_here(schedulefree(steps=5), tmp_path / "resumed")
    resumed = train_here(schedulefree(), tmp_path / "resumed")
    workers = train_with_threads(schedulefree(workers=2, batch=4), tmp_path / "workers")
    assert equal(straight, rare)
    assert equal(straight, resumed)
    for name, value in state(workers).items():
        torch.testing.assert_close(value, state(straight)[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("changes", "what"), [({"ema": 0.9}, "ema"), ({"optimizer": "schedulefree"}, "optimizer")])
def test_workers_that_differ_have_no_average(changes: dict[str, Any], what: str) -> None:
    base = {"kind": "train", "task": "raytrain.testing:tiny", "sync": "diloco"}
    TrainRecipe.parse(base)
    with pytest.raises(
        RecipeError, match=rf"^recipe: sync.name: expected ddp or fsdp with an average .*\({what}\), .*; got"
    ):
        TrainRecipe.parse({**base, **changes})


def test_two_averages_are_one_too_many() -> None:
    with pytest.raises(RecipeError, match=r"^recipe: expected ema = 0, because schedulefree averages by itself; got 0"):
        schedulefree(ema=0.9)
