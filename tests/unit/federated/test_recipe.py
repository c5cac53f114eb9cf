"""The recipe of a federated run: what it takes, what it refuses and how it says so."""

import csv
import re
import tomllib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from federated import InProcessGrid
from federated.broadcast import payload_bytes
from federated.build import Federation, partition_of, protocol_of, task_of
from federated.evaluation import ClientScore, over_clients
from federated.options import PARTITION_OPTIONS
from federated.protocols.options import PROTOCOL_OPTIONS
from federated.recipe import FederateRecipe, options_of_partition, options_of_protocol
from federated.records import write_scores
from federated.tables import FAULTS, PARTITIONS, PROTOCOLS, STRATEGIES
from raytrain.errors import RecipeError
from raytrain.recipe import read_toml
from raytrain.registry import resolve, summary
from raytrain.seeds.seed_model import SeedModel
from raytrain.tasks.task import Task

TABLES = (PROTOCOLS, PARTITIONS, FAULTS, STRATEGIES)
ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "federated" / "recipes").glob("*.toml"))
DIGITS = {"task": {"name": "digits", "model": "mlp", "widths": [4]}, "optimizer": {"lr": 1e-3}}


def recipe_of(**more: Any) -> FederateRecipe:
    return FederateRecipe.parse_with(DIGITS, more)


@pytest.mark.parametrize(("table", "name"), [pytest.param(table, name, id=name) for table in TABLES for name in table])
def test_every_name_stands_for_something_described(table: dict[str, str], name: str) -> None:
    assert summary(table, name).endswith((".", ")"))


def test_options_that_are_read_without_torch_are_those_that_constructors_declare() -> None:
    protocols = {name: options_of_protocol(resolve(PROTOCOLS, name, "protocol.name")) for name in PROTOCOLS}
    assert protocols == PROTOCOL_OPTIONS
    partitions = {name: options_of_partition(resolve(PARTITIONS, name, "partition.name")) for name in PARTITIONS}
    assert partitions == PARTITION_OPTIONS


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipes_say_what_they_are(file: Path) -> None:
    recipe = FederateRecipe.parse(read_toml(str(file), [])[0])
    assert recipe.name == file.stem
    assert file.read_text().startswith("# ")
    assert FederateRecipe.parse(tomllib.loads(recipe.to_toml())) == recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clients.count": 5}, "recipe: clients.per_round: expected at most clients.count = 5; got 10"),
        ({"clients.count": 0}, "recipe: clients.count: expected 1 or more with partition iid; got 0"),
        ({"faults.quorum": 11}, "recipe: faults.quorum: expected at most clients.per_round = 10; got 11"),
        (
            {"protocol.pool": 65537},
            "protocol.pool: expected at most 65536 seeds, which two bytes tell apart; got 65537",
        ),
        (
            {"protocol": {"name": "sign", "pool": 65537}},
            "protocol.pool: expected at most 65536 seeds, which two bytes tell apart; got 65537",
        ),
        ({"rounds": 65536}, "rounds: expected less than or equal to 65535; got 65536"),
        (
            {"strategy.name": "FedAvg"},
            "recipe: strategy.name: FedAvg averages arrays of parameters, and clients of fedkseed send numbers; "
            "leave it out",
        ),
        (
            {"strategy.name": "FedAwg"},
            "strategy.name: no such strategy 'FedAwg'; did you mean FedAvg ",
        ),
        ({"protocol": "flower"}, "recipe: strategy.name: required with protocol flower; known: Bulyan, FedAdagrad, "),
        (
            {"protocol": "flower", "strategy.name": "FedAvg"},
            "recipe: optimizer.name: expected one with gradients, as sgd, with protocol flower; got zo-sgd",
        ),
        (
            {"protocol": "flower", "strategy.name": "FedAvg", "optimizer.name": "sgd", "faults.garble": 0.5},
            "recipe: faults.garble: expected 0 with protocol flower, whose arrays have no seal; got 0.5",
        ),
        ({"workers": 2}, "workers: no such field; a federated recipe says clients.actors"),
        ({"steps": 2}, "steps: no such field; a federated recipe says rounds and protocol.local_steps"),
        ({"round": 2}, "round: no such field; did you mean rounds? known: "),
        ({"protocol.alpha": 2}, "protocol.alpha: no such field; known: batch, down, "),
        ({"protocol.down": "one-byte"}, "protocol.down: expected 'float32' or 'float16'; got 'one-byte'"),
        ({"protocol": {"name": "sign", "up": "float32"}}, "protocol.up: no such field; known: batch, form"),
        ({"protocol": "fedkseet"}, "protocol.name: no such name 'fedkseet'; did you mean fedkseed or fedkseed-pro? "),
        (
            {"optimizer.name": "zo-adam"},
            "recipe: optimizer.name: expected zo-sgd with fedkseed, whose steps the server repeats as a sum; "
            "got zo-adam",
        ),
        (
            {"optimizer.lr": 0.1, "protocol.weight_decay": 10.0},
            "recipe: protocol.weight_decay: expected below 1 / optimizer.lr = 10; got 10",
        ),
        (
            {"optimizer.lr": 0.1, "protocol.weight_decay": 5.0, "rounds": 200},
            "recipe: protocol.weight_decay: expected to leave at least 1e-30 of the first round's step after "
            "200 rounds; 5 leaves ",
        ),
        (
            {"freeze.random_half": True},
            "recipe: freeze.random_half: expected false: no client of a federated run freezes other layers",
        ),
        (
            {"optimizer.gradient_noise": 2.0},
            "recipe: optimizer.gradient_noise: expected 0: clients of a federated run add none; got 2",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_of(**fields)
    assert str(error.value).startswith(message)


def without_labels() -> Task:
    digits = task_of(recipe_of())
    return Task(model=digits.model, data=lambda split: list(range(50)), losses=digits.losses)


def test_what_only_the_data_can_tell_is_said_by_check() -> None:
    for name in ("dirichlet", "shards"):
        recipe = recipe_of(task=f"{__name__}:without_labels", partition=name)
        with pytest.raises(RecipeError, match="^partition.name: expected examples with labels, as pairs"):
            partition_of(recipe, task_of(recipe))
    recipe = recipe_of(partition="domain", **{"clients.count": 0})
    with pytest.raises(RecipeError, match=r"^clients.per_round: expected at most 1, as many as there are clients; got"):
        partition_of(recipe, task_of(recipe))


def test_groups_and_frozen_parameters_shape_the_directions() -> None:
    groups = [{"match": "5.weight", "lr_scale": 4.0}, {"match": "1.*", "lr_scale": 0.0}]
    federation = Federation.of(recipe_of(**{"freeze.match": ["5.bias"], "optimizer.groups": groups}))
    scales = {part.name: part.scale for part in federation.model.directions.slices}
    assert scales == {"1.weight": 0.0, "1.bias": 0.0, "5.weight": 2.0}
    other = Federation.of(recipe_of(seed=1))
    assert other.model.base != Federation.of(recipe_of()).model.base


def test_an_evaluation_tells_of_each_client_and_of_the_worst_tenth(tmp_path: Path) -> None:
    federation = Federation.of(recipe_of(**{"evaluation.clients": 0.2, "partition": {"name": "dirichlet"}}))
    metrics = federation.evaluate(federation.server(), partial(write_scores, tmp_path / "clients.csv"))
    rows = list(csv.DictReader((tmp_path / "clients.csv").read_text().splitlines()))
    sizes = {int(row["client"]): int(row["examples"]) for row in rows}
    assert sizes == {client: federation.partition.size(client) for client in sizes}
    accuracies = sorted(float(row["accuracy"]) for row in rows)
    assert len(rows) == 20
    assert metrics["clients"] == pytest.approx(sum(accuracies) / 20)
    assert metrics["worst_tenth"] == pytest.approx(sum(accuracies[:2]) / 2)
    assert 0 <= metrics["worst_tenth"] <= metrics["clients"] <= 1
    assert metrics["spread"] > 0
    assert 0 <= metrics["accuracy"] <= 0.3


def test_a_client_on_whose_examples_a_metric_has_no_meaning_does_not_count(tmp_path: Path) -> None:
    scores = [
        ClientScore(1, 4, {"loss": 1.0}),
        ClientScore(2, 5, {"loss": 2.0, "f1": 0.5}),
        ClientScore(3, 6, {"loss": 3.0, "f1": 0.7}),
    ]
    write_scores(tmp_path / "clients.csv", scores)
    assert (tmp_path / "clients.csv").read_text().splitlines() == [
        "client,examples,loss,f1",
        "1,4,1.0,",
        "2,5,2.0,0.5",
        "3,6,3.0,0.7",
    ]
    task = SimpleNamespace(metric="f1", better="higher")
    assert over_clients(scores, task) == pytest.approx({"clients": 0.6, "worst_tenth": 0.5, "spread": 0.1})
    assert over_clients(scores[:1], task) == {}


def rare() -> Task:
    """A task whose metric is the share of ones among examples that are not 0, of which some clients have none."""
    return Task(
        model=lambda seed: torch.nn.Linear(1, 1),
        data=lambda split: [torch.tensor([float(index % 10 == 0)]) for index in range(60)],
        losses=lambda module, batch: module(batch)[:, 0].square(),
        measure=lambda module, batch: {"ones": (float((batch > 0).sum()), float((batch > 0).sum()))},
        metric="ones",
        better="higher",
    )


def test_an_evaluation_goes_on_where_clients_measure_nothing() -> None:
    recipe = FederateRecipe.parse(
        {"kind": "federate", "task": f"{__name__}:rare", "clients": {"count": 20, "per_round": 2}}
    )
    federation = Federation.of(recipe.with_overrides({"evaluation.clients": 1.0}))
    kept: list[ClientScore] = []
    metrics = federation.evaluate(federation.server(), kept.extend)
    assert len(kept) == 20
    assert 0 < sum("ones" in score.metrics for score in kept) < 20
    assert (metrics["ones"], metrics["clients"]) == (1.0, 1.0)


def test_few_clients_evaluate_where_that_is_less_than_one() -> None:
    federation = Federation.of(recipe_of(**{"clients.count": 12, "evaluation.clients": 0.01}))
    kept: list[ClientScore] = []
    federation.evaluate(federation.server(), kept.extend)
    assert len(kept) == 1


def test_a_client_with_more_examples_than_reports_may_say_is_found_before_the_run() -> None:
    with pytest.raises(RecipeError) as error:
        Federation.of(recipe_of(**{"clients.count": 10, "limits.examples": 100}))
    assert str(error.value) == (
        "limits.examples: expected at least 144, the examples of the largest client, or its reports would be refused; "
        "got 100"
    )


README = (ROOT / "federated" / "README.md").read_text()


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app, partition = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(app.replace("rounds=40", 'rounds=2, protocol={"local_steps": 3}'), names)
    names["main"](InProcessGrid(names["client_app"], clients=100), None)
    assert SeedModel.load(Path("model.safetensors")).version == 2
    names = {"examples": [(n, n % 3) for n in range(900)], "context": SimpleNamespace(node_config={"partition-id": 7})}
    exec(partition.partition("\nwith ")[0], names)
    assert 0 < len(names["mine"]) < 900


def test_the_bytes_in_the_readme_are_those_that_are_sent() -> None:
    float32 = {"up": "float32", "down": "float32"}
    for row, options, heard in (
        ("`fedkseed`, float32 both ways", {"name": "fedkseed", **float32}, 10),
        ("`fedkseed`", {"name": "fedkseed"}, 10),
        ('`common-seeds`, `down = "float16"`', {"name": "common-seeds", "down": "float16"}, 10),
        ("`common-seeds`", {"name": "common-seeds"}, 10),
        ("`sign`, 9 clients", {"name": "sign"}, 9),
    ):
        protocol = protocol_of(recipe_of(protocol=options))
        cells = [f"{down:,} + {up:,}" for down, up in (payload_bytes(protocol, heard, missed) for missed in (1, 10))]
        assert f"| {row} | {' | '.join(cells)} |" in README
