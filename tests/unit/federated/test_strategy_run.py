"""Clients that send parameters, and the strategies that average them, in one process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from federated.checkpoint import read_newest, write_checkpoint
from federated.flower.channel import GridMessenger
from federated.flower.gradient_client import GradientClient
from federated.flower.identity import assume_identity
from federated.flower.strategy_run import StrategyRun, load_gradient_clients
from federated.flower.testing import InProcessGrid
from federated.gradients import arrays_of, load_arrays
from federated.recipe import FederateRecipe
from federated.results import load_federated_model
from federated.server import CommunicationRound
from federated.tables import STRATEGIES
from raytrain.errors import RecipeError

FIELDS: dict[str, Any] = {
    "kind": "federate",
    "task": "raytrain.testing:tiny",
    "clients": {"count": 6, "per_round": 3},
    "protocol": {"name": "flower", "local_steps": 5, "batch": 4},
    "strategy": {"name": "FedAvg"},
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "schedule": {"name": "linear"},
    "rounds": 3,
}


def recipe_of(**more: Any) -> FederateRecipe:
    return FederateRecipe.parse_with(FIELDS, more)


@pytest.fixture(autouse=True)
def identity() -> None:
    assume_identity(run_id=1)


class RecordingGrid(InProcessGrid):
    """A grid whose clients are those of a recipe, and which notes the clients whose processes are ended."""

    def __init__(self, recipe: FederateRecipe) -> None:
        super().__init__(load_gradient_clients(recipe.to_dict()))
        self.ended: list[int] = []

    def play(self, run: StrategyRun, folder: Path) -> list[CommunicationRound]:
        return list(run.play(self, range(2, 8), folder, lambda done: None, self.ended.append))


def test_a_round_of_fedavg_is_the_mean_of_its_clients_by_examples(tmp_path: Path) -> None:
    recipe = recipe_of(**{"partition.sizes": "zipf"})
    run, client = StrategyRun(recipe), load_gradient_clients(recipe.to_dict())
    before = {name: value.copy() for name, value in run.arrays.items()}
    done = run.play_round(GridMessenger(RecordingGrid(recipe), range(2, 8)))
    results = [client.trainer.fit(each, 0, before, lr_ratio=1.0, proximal_mu=0.0) for each in sorted(done.heard)]
    counts = np.array([result.examples for result in results])
    assert len(set(counts.tolist())) > 1
    for name, value in run.arrays.items():
        mean = sum(count * result.arrays[name] for count, result in zip(counts, results, strict=True)) / counts.sum()
        assert np.allclose(value, mean, rtol=1e-5, atol=1e-7)
    assert any(not np.array_equal(value, before[name]) for name, value in run.arrays.items())


def fitted(client: GradientClient, **options: float) -> np.ndarray:
    run = StrategyRun(recipe_of())
    result = client.trainer.fit(3, 1, run.arrays, **{"lr_ratio": 1.0, "proximal_mu": 0.0, **options})
    return np.concatenate([(result.arrays[name] - value).ravel() for name, value in run.arrays.items()])


def test_a_client_leaves_nothing_behind_and_a_proximal_term_holds_it_near() -> None:
    client = load_gradient_clients(recipe_of(**{"task.dropout": 0.5, "task.norm": True}).to_dict())
    plain = load_gradient_clients(recipe_of().to_dict())
    first = fitted(plain)
    fitted(plain, lr_ratio=3.0)
    assert np.array_equal(fitted(plain), first)
    assert np.linalg.norm(fitted(plain, proximal_mu=5.0)) < 0.9 * np.linalg.norm(first)
    assert np.linalg.norm(fitted(plain, lr_ratio=0.1)) < 0.5 * np.linalg.norm(first)
    arrays = arrays_of(client.trainer._module)
    one, other = (client.trainer.fit(2, 0, arrays, lr_ratio=1.0, proximal_mu=0.0) for _ in range(2))
    assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in arrays), "dropout and buffers too"


@pytest.mark.parametrize("name", STRATEGIES)
def test_running_statistics_travel_and_no_step_of_a_server_carries_a_variance_below_0(name: str) -> None:
    task = {"name": "digits", "model": "mlp", "widths": [8], "norm": "batch"}
    more: dict[str, Any] = {"arguments": {"client_learning_rate": 0.05}} if name == "QFedAvg" else {}
    fields = {**FIELDS, "task": task, "strategy": {"name": name, **more}, "rounds": 2}
    recipe = FederateRecipe.parse({**fields, "clients": {"count": 20, "per_round": 8}})
    run = StrategyRun(recipe)
    messenger = GridMessenger(InProcessGrid(load_gradient_clients(recipe.to_dict()), clients=20), range(2, 22))
    for _ in range(2):
        assert len(run.play_round(messenger).used) == 8
    means = [value for key, value in run.arrays.items() if key.endswith("running_mean")]
    variances = [value for key, value in run.arrays.items() if key.endswith("running_var")]
    assert means
    assert all(value.any() for value in means), "they are those of the clients"
    assert all((value > 0).all() for value in variances)


def test_batch_norm_evaluates_with_the_statistics_of_clients() -> None:
    task = {"name": "digits", "model": "cnn", "norm": "batch"}
    fields: dict[str, Any] = {**FIELDS, "task": task, "clients": {"count": 4, "per_round": 4}, "rounds": 4}
    recipe = FederateRecipe.parse({**fields, "protocol": {"name": "flower", "local_steps": 15, "batch": 16}})
    run = StrategyRun(recipe)
    messenger = GridMessenger(InProcessGrid(load_gradient_clients(recipe.to_dict()), clients=4), range(2, 6))
    while not run.is_done():
        run.play_round(messenger)
    assert run.evaluate()["accuracy"] > 0.8, "it was a tenth with the statistics of the first weights"


class Odd(torch.nn.Module):
    """A model with a parameter that has no dimension and one in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.tensor(2.0))
        self.narrow = torch.nn.Parameter(torch.tensor([1.5, -0.25], dtype=torch.bfloat16))


def test_scalars_and_bfloat16_travel_there_and_back(tmp_path: Path) -> None:
    arrays = arrays_of(Odd())
    assert {name: (value.shape, str(value.dtype)) for name, value in arrays.items()} == {
        "temperature": ((), "float32"),
        "narrow": ((2,), "float32"),
    }
    write_checkpoint(tmp_path, 1, {}, arrays)
    found = read_newest(tmp_path)
    assert found is not None
    assert found[1]["temperature"].shape == ()
    module = Odd()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    load_arrays(module, found[1])
    assert (module.temperature.item(), module.narrow.tolist()) == (2.0, [1.5, -0.25])


def test_an_average_that_is_not_finite_leaves_the_model_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    recipe = recipe_of(**{"strategy.name": "FedAdam", "strategy.arguments": {"eta": 1e300}})
    run = StrategyRun(recipe)
    before = {name: value.copy() for name, value in run.arrays.items()}
    with np.errstate(over="ignore", invalid="ignore"):
        run.play_round(GridMessenger(RecordingGrid(recipe), range(2, 8)))
    assert all(np.array_equal(before[name], value) for name, value in run.arrays.items())
    assert "round 0: its average is not finite; the model stays as it is" in caplog.text


def test_only_trainable_parameters_travel() -> None:
    whole, frozen = StrategyRun(recipe_of()), StrategyRun(recipe_of(**{"freeze.match": ["*weight"]}))
    assert 0 < frozen.parameter_bytes() < whole.parameter_bytes()
    assert set(frozen.arrays) < set(whole.arrays)
    module = torch.nn.Linear(2, 1)
    module.bias.requires_grad_(requires_grad=False)
    load_arrays(module, {"weight": np.array([[1.0, 2.0]], np.float32)})
    assert module.weight.tolist() == [[1.0, 2.0]]


def test_faults_are_counted_and_a_round_without_a_quorum_moves_nothing(tmp_path: Path) -> None:
    faults = {"faults.drop": 0.3, "faults.crash": 0.3, "rounds": 6, "faults.quorum": 2}
    recipe = recipe_of(**faults)
    grid, run = RecordingGrid(recipe), StrategyRun(recipe)
    rounds = grid.play(run, tmp_path)
    assert {reason for done in rounds for reason in done.missing.values()} == {"no answer", "its process was lost"}
    crashed = [client for done in rounds for client, reason in done.missing.items() if "process" in reason]
    assert sorted(grid.ended) == sorted(crashed)
    assert all(len(done.used) == (len(done.heard) if len(done.heard) > 1 else 0) for done in rounds)
    assert {len(done.used) for done in rounds} > {0}
    without = recipe_of(**{"faults.drop": 1.0, "rounds": 1})
    still = StrategyRun(without)
    before = {name: value.copy() for name, value in still.arrays.items()}
    RecordingGrid(without).play(still, tmp_path / "still")
    assert all(np.array_equal(before[name], value) for name, value in still.arrays.items())


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of()
    RecordingGrid(recipe).play(StrategyRun(recipe), tmp_path)
    other = StrategyRun(recipe_of(**{"strategy.name": "FedMedian"}))
    with pytest.raises(
        RecipeError, match=r'expected a run with strategy = {"arguments": {}, "name": "FedMedian"}; got {'
    ):
        other.resume(tmp_path)
    with pytest.raises(RecipeError, match=r"expected a run with partition = "):
        StrategyRun(recipe_of(**{"partition.sizes": "zipf"})).resume(tmp_path)
    with pytest.raises(RecipeError, match=r"expected a run whose .*norm.* the recipe has another model now"):
        StrategyRun(recipe_of(**{"task.norm": True})).resume(tmp_path)
    again = StrategyRun(recipe_of(**{"clients.actors": 3}))
    again.resume(tmp_path)
    assert again.is_done()


def test_arguments_that_a_strategy_does_not_take_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^strategy.arguments: FedProx: .*unexpected keyword argument 'mu'"):
        StrategyRun(recipe_of(**{"strategy.name": "FedProx", "strategy.arguments": {"mu": 1}}))
    with pytest.raises(RecipeError, match=r"^strategy.arguments: QFedAvg: .*missing 1 .*'client_learning_rate'"):
        StrategyRun(recipe_of(**{"strategy.name": "QFedAvg"}))


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({}, ["1.weight", "1.bias", "5.weight", "5.bias"]),
        ({"freeze.match": ["1.*"]}, ["5.weight", "5.bias"]),
        ({"adapter.name": "lora", "adapter.r": 2, "adapter.target_modules": ["1"]}, ["1.lora_A", "1.lora_B"]),
    ],
    ids=["all", "last layer", "LoRA"],
)
def test_a_run_of_some_parameters_is_loaded_as_it_was(more: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    task = {"name": "digits", "model": "mlp", "widths": [16]}
    recipe = recipe_of(**more, task=task, **{"protocol.local_steps": 20})
    run = StrategyRun(recipe)
    assert [name.removesuffix(".default.weight") for name in run.arrays] == names
    before = run.evaluate()["loss"]
    RecordingGrid(recipe).play(run, tmp_path)
    run.save_model(tmp_path)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    evaluated = load_federated_model(tmp_path, {}).evaluate()
    assert evaluated == {"step": 3, **run.evaluate()}
    assert evaluated["loss"] < before
