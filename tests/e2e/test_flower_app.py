"""Flower apps as their authors wrote them, on Ray."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from federated.launch.actor_pool import ActorOptions
from federated.launch.app import FlowerApp, read_app, run_app
from raytrain.errors import RecipeError

DATA = Path(__file__).parent / "data"
QUICKSTART = DATA / "flower_quickstart"


Call = Callable[..., Any]


def test_the_quickstart_learns_the_same_on_any_number_of_actors_and_by_the_command(
    ray_cluster: None, workplace: Path, raytrain: Call
) -> None:
    path, drawn = list(sys.path), random.getstate()
    app = read_app(QUICKSTART, {"num-server-rounds": 5, "local-epochs": 2})
    context = run_app(app, 6, ActorOptions(1, cpus=0.5), seed=3)
    assert context.state["accuracy"]["eval_acc"] > 0.6
    assert context.run_config["batch-size"] == 16
    assert (sys.path, random.getstate()) == (path, drawn)
    model = torch.load("final_model.pt", weights_only=True)
    Path("final_model.pt").unlink()
    fields = ["clients.count=6", "clients.actors=2", "clients.cpus=0.5", "seed=3", "config.num-server-rounds=5"]
    ended = raytrain("federate", "--app", str(QUICKSTART), *fields, "config.local-epochs=2")
    assert ended.status == 0, ended.err
    again = torch.load("final_model.pt", weights_only=True)
    assert all(torch.equal(model[name], again[name]) for name in model)


def test_an_app_with_client_fn_and_server_fn_runs(ray_cluster: None, workplace: Path, raytrain: Call) -> None:
    fields = ["clients.count=3", "clients.actors=1", "clients.cpus=0.5", "config.rounds=3"]
    ended = raytrain("federate", str(DATA / "flower_legacy"), "--app", *fields)
    assert ended.status == 0, ended.err
    number, end = json.loads(f"[{Path('final.txt').read_text().replace(' ', ',', 1)}]")
    assert "train  heard 3 of 3" in ended.out
    assert (number, end) == (3, pytest.approx([1 - 1 / 8**3] * 2)), "each round goes 7/8 of the way to the mean, 1"


@pytest.mark.parametrize(
    ("changes", "said"), [("garble=0.1", "as the messages of an app"), ("quorum=2", "strategy says")]
)
def test_faults_that_an_app_cannot_have_are_refused(raytrain: Call, workplace: Path, changes: str, said: str) -> None:
    ended = raytrain("federate", "--app", str(DATA / "flower_legacy"), f"faults.{changes}")
    assert (ended.status, said in ended.err) == (2, True)


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


BROKEN = {
    "server = 7\n": "serverapp: expected a ServerApp at unsound:server; got int",
    "import nowhere\n": (
        "serverapp: cannot import 'unsound': ModuleNotFoundError: No module named 'nowhere' (unsound.py, line 1)"
    ),
    "from flwr.serverapp import ServerApp\nserver = ServerApp()\n": (
        "clientapp: 'unsound' has no 'client'; known: ServerApp, server"
    ),
    "from flwr.serverapp import ServerApp\nserver = client = ServerApp()\n": (
        "clientapp: expected a ClientApp at unsound:client; got ServerApp"
    ),
}


@pytest.mark.parametrize("code", BROKEN, ids=["no-app", "no-module", "no-client", "no-client-app"])
def test_an_app_that_cannot_be_loaded_is_refused_before_ray_starts(workplace: Path, raytrain: Call, code: str) -> None:
    text = (DATA / "flower_legacy" / "pyproject.toml").read_text()
    (workplace / "pyproject.toml").write_text(text.replace("legacy:", "unsound:"))
    (workplace / "unsound.py").write_text(code)
    ended = raytrain("federate", "--app", ".")
    assert (ended.status, ended.err) == (2, f"raytrain: {BROKEN[code]}\n")


def test_what_is_no_app_or_fails_is_told_apart(workplace: Path, raytrain: Call, ray_cluster: None) -> None:
    assert raytrain("train", "--app", ".").err == "raytrain: --app: raytrain train runs recipes, and no apps\n"
    ended = raytrain("federate", "--app", "nowhere")
    assert ended.status == 2
    assert ended.err.startswith("raytrain: --app: nowhere is no Flower app: Cannot find pyproject.toml in")
    ended = raytrain("federate", "--app", str(DATA / "flower_legacy"), "clients.per_round=3")
    assert (ended.status, "clients.per_round: no such field" in ended.err) == (2, True)
    ended = raytrain("federate", "--app", str(DATA / "flower_legacy"), "--out", "run")
    assert (ended.status, "expected neither --out nor --resume" in ended.err) == (2, True)
    ended = raytrain("submit", "--", "federate", "--app", ".")
    assert (ended.status, "--app: expected a recipe, which is what a job runs" in ended.err) == (2, True)
    text = (DATA / "flower_legacy" / "pyproject.toml").read_text()
    (workplace / "pyproject.toml").write_text(text.replace("legacy:", "unsound:"))
    (workplace / "unsound.py").write_text(
        "from flwr.clientapp import ClientApp\nfrom flwr.serverapp import ServerApp\n"
        "client, server = ClientApp(), ServerApp()\n"
        "@server.main()\ndef main(grid, context):\n    raise ValueError('no luck')\n"
    )
    ended = raytrain("federate", "--app", ".", "clients.actors=1", "clients.cpus=0.5")
    assert (ended.status, ended.err) == (1, "raytrain: serverapp: ValueError: no luck (unsound.py, line 6)\n")
