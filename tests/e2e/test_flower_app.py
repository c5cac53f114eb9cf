"""Flower apps as their authors wrote them, on Ray."""

import random
import sys
from pathlib import Path

import pytest
import torch

from federated.launch.actor_pool import ActorOptions
from federated.launch.app import FlowerApp, read_app, run_app
from raytrain.errors import RecipeError

DATA = Path(__file__).parent / "data"
QUICKSTART = DATA / "flower_quickstart"


def test_the_quickstart_learns_the_same_on_any_number_of_actors(ray_cluster: None, workplace: Path) -> None:
    models, path, drawn = [], list(sys.path), random.getstate()
    for actors in (1, 2):
        app = read_app(QUICKSTART, {"num-server-rounds": 5, "local-epochs": 2})
        context = run_app(app, 6, ActorOptions(actors, cpus=0.5), seed=3)
        models.append(torch.load("final_model.pt", weights_only=True))
        assert context.state["accuracy"]["eval_acc"] > 0.6
        assert context.run_config["batch-size"] == 16
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert (sys.path, random.getstate()) == (path, drawn)


def test_an_app_with_client_fn_and_server_fn_runs(ray_cluster: None, workplace: Path) -> None:
    run_app(read_app(DATA / "flower_legacy"), 3, ActorOptions(1, cpus=0.5))
    assert Path("final.txt").read_text() == f"2 {[0.984375] * 2}", "each round goes 7/8 of the way to the mean, 1"


def test_an_app_that_draws_when_it_is_imported_draws_the_same_in_each_actor(workplace: Path) -> None:
    (workplace / "drawn.py").write_text("import random\nclient = random.random()\n")
    app = FlowerApp(workplace, "drawn:server", "drawn:client", {})
    first = app.load_client(3).client
    del sys.modules["drawn"]
    assert app.load_client(3).client == first


def test_a_folder_that_is_no_app_is_refused(workplace: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_app(QUICKSTART, {"num-rounds": 5})
    assert str(caught.value) == (
        "--app: [tool.flwr.app.config] has no key 'num-rounds'; did you mean num-server-rounds? "
        "known: batch-size, fraction-train, learning-rate, local-epochs, num-server-rounds"
    )
    with pytest.raises(RecipeError) as caught:
        read_app(workplace)
    assert str(caught.value) == f"--app: {workplace} is no Flower app: Cannot find pyproject.toml in {workplace}"
    (workplace / "pyproject.toml").write_text('[project]\nname = "mine"\n')
    with pytest.raises(RecipeError, match=r'no Flower app: Invalid pyproject.toml:\n  - Property "version" missing'):
        read_app(workplace)
    head = '[project]\nname = "mine"\nversion = "1"\n[tool.flwr.app]\npublisher = "me"\n[tool.flwr.app.components]\n'
    (workplace / "pyproject.toml").write_text(head + 'agentapp = "mine:app"\nserverapp = "mine:app"\n')
    with pytest.raises(RecipeError) as caught:
        read_app(workplace)
    assert str(caught.value) == (f"--app: {workplace} has no clientapp in [tool.flwr.app.components] of pyproject.toml")


def test_an_app_that_cannot_be_loaded_is_refused(ray_cluster: None, workplace: Path) -> None:
    text = (DATA / "flower_legacy" / "pyproject.toml").read_text()
    (workplace / "pyproject.toml").write_text(text.replace("legacy:", "unsound:"))
    (workplace / "unsound.py").write_text("server = 7\n")
    with pytest.raises(RecipeError) as caught:
        run_app(read_app(workplace), 3, ActorOptions(1, cpus=0.5))
    assert str(caught.value) == "serverapp: expected a ServerApp at unsound:server; got int"
    sys.modules.pop("unsound")
    (workplace / "unsound.py").write_text("from flwr.serverapp import ServerApp\nserver = ServerApp()\n")
    with pytest.raises(RecipeError, match=r"^clientapp: 'unsound' has no 'client'; known: ServerApp, server$"):
        run_app(read_app(workplace), 3, ActorOptions(1, cpus=0.5))
