"""Protocols in a Flower program of the user's own: the rounds of a recipe, to the bit."""

import pickle
from pathlib import Path

import pytest
import torch

from federated import FedKSeed, InProcessGrid, Sign
from federated.build import Federation
from federated.flower.strategies import SeedStrategy
from federated.recipe import FederateRecipe
from raytrain.errors import RecipeError

TINY = "raytrain.testing:tiny"
FIELDS = {"rounds": 3, "clients": {"count": 4, "per_round": 3}}
STEPS = {"protocol": {"local_steps": 6}, "optimizer.lr": 0.01}


def play(strategy: SeedStrategy, asked: bool = False, folder: Path | None = None) -> torch.nn.Module:
    grid = InProcessGrid(strategy.client_app(), clients=4)
    return strategy.start(grid, nodes=None if asked else grid.get_node_ids(), folder=folder)


@pytest.mark.parametrize("kind", [FedKSeed, Sign])
def test_a_strategy_plays_the_rounds_of_its_recipe(tmp_path: Path, kind: type[SeedStrategy]) -> None:
    strategy = kind(TINY, **FIELDS, **STEPS)
    module = play(strategy, asked=True)
    raw = {"kind": "federate", "task": TINY, **FIELDS, "optimizer": {"lr": 0.01}}
    recipe = FederateRecipe.parse({**raw, "protocol": {"name": kind.name, "local_steps": 6}})
    federation = Federation.of(recipe)
    server = federation.server()
    for _ in federation.simulation(server).run(tmp_path):
        pass
    assert strategy.recipe == recipe
    assert strategy.evaluate() == federation.evaluate(server)
    assert len(strategy.seed_model().seeds) > 0
    expected = federation.model.module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


def test_a_strategy_goes_on_from_its_folder_and_an_actor_gets_its_recipe_only(tmp_path: Path) -> None:
    seen: list[int] = []
    first, again = (FedKSeed(TINY, **FIELDS, **STEPS) for _ in range(2))
    play(first, folder=tmp_path)
    grid = InProcessGrid(again.client_app(), clients=4)
    again.start(grid, nodes=grid.get_node_ids(), folder=tmp_path, record=lambda done: seen.append(done.number))
    assert (seen, again.evaluate()) == ([], first.evaluate())
    assert vars(pickle.loads(pickle.dumps(first))) == {"recipe": first.recipe}, "as Ray sends it"


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match="protocol.name: expected fedkseed, of FedKSeed; leave it out"):
        FedKSeed(TINY, protocol="sign")
    with pytest.raises(RecipeError, match="protocol.name: expected sign, of Sign; leave it out"):
        Sign(TINY, protocol={"name": "fedkseed"})
    with pytest.raises(RecipeError, match="protocol.local_step: no such field; did you mean local_steps"):
        FedKSeed(TINY, protocol={"local_step": 3})
    grid = InProcessGrid(FedKSeed(TINY, **FIELDS).client_app(), clients=2)
    with pytest.raises(RecipeError, match="clients.count: expected 4 clients within 0.5 s; got 2"):
        FedKSeed(TINY, **FIELDS).start(grid, wait_seconds=0.5)
