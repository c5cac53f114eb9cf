"""Runs Flower apps on the Ray cluster: a user's own folder as it is, and any `ServerApp` on a `RayGrid`."""

import contextlib
import gc
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfig, UserConfigValue
from flwr.clientapp import ClientApp
from flwr.common.config import get_fused_config_from_dir, get_project_config
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid, ServerApp
from pydantic import Field, field_validator

from federated.faults import ClientFaultPlan
from federated.flower.seeding import SeededClient, global_seed, seed_globals
from federated.launch.actor_pool import ActorOptions
from federated.launch.app_grid import AppGrid
from federated.options import Faults
from raytrain.errors import RaytrainError, RecipeError, TrainingError
from raytrain.launch.session import OWN_CLUSTER, ray_session
from raytrain.recipe import Recipe, Section, dotted_fields
from raytrain.registry import error_location, resolve, suggest

logger = logging.getLogger(__name__)

ComponentT = TypeVar("ComponentT", ServerApp, ClientApp)


class AppClients(Section):
    """Who takes part in an app, and on what.

    Attributes:
        count: clients that there are.
        actors: processes that serve them; 0: as many as there are free CPUs, and at most two for each GPU.
        cpus: of each process.
        gpus: of each process.
    """

    count: int = Field(10, ge=1, lt=2**32)
    actors: int = Field(0, ge=0)
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)


class AppRun(Recipe):
    """What `raytrain federate --app DIR` may change.

    Attributes:
        clients: that the app has.
        faults: that happen to clients; its strategy says how many have to be heard.
        config: keys of its `[tool.flwr.app.config]`.
    """

    kind: Literal["federate"] = "federate"
    clients: AppClients = AppClients()
    faults: Faults = Faults()
    config: Mapping[str, Any] = {}

    @field_validator("faults")
    @classmethod
    def _known_to_apps(cls, faults: Faults) -> Faults:
        if faults.garble:
            raise ValueError(f"garble: expected 0, as the messages of an app have no seal; got {faults.garble:g}")
        if faults.quorum != 1:
            raise ValueError(f"quorum: expected 1, as the app's strategy says who has to be heard; got {faults.quorum}")
        return faults


@dataclass(frozen=True, slots=True)
class FlowerApp:
    """What the `pyproject.toml` of a Flower app says.

    Attributes:
        folder: where it is.
        server: its `ServerApp`, as "module:attribute".
        client: its `ClientApp`, likewise.
        run_config: `[tool.flwr.app.config]`, nested keys joined by dots, with the user's changes.
    """

    folder: Path
    server: str
    client: str
    run_config: UserConfig

    def load_client(self, seed: int) -> SeededClient:
        """Return the clients' app, in the process of an actor; its module may draw numbers when it is imported."""
        seed_globals(seed)
        return SeededClient(resolve({}, self.client, "clientapp"), seed)


def read_app(folder: Path, changes: Mapping[str, UserConfigValue] | None = None) -> FlowerApp:
    """Return the Flower app of a folder.

    Args:
        folder: with a `pyproject.toml` that has `[tool.flwr.app]`, as for `flwr run`.
        changes: to its `[tool.flwr.app.config]`.

    Raises:
        RecipeError: there is no such app, or it does not have a key that is to be changed.
    """
    try:
        components = get_project_config(folder)["tool"]["flwr"]["app"]["components"]
        run_config = get_fused_config_from_dir(folder, {})
    except (OSError, ValueError) as error:
        raise RecipeError(f"--app: {folder} is no Flower app: {error}") from error
    if missing := {"serverapp", "clientapp"} - set(components):
        raise RecipeError(f"--app: {folder} has no {min(missing)} in [tool.flwr.app.components] of pyproject.toml")
    changes = changes or {}
    for key in changes:
        if key not in run_config:
            raise RecipeError(f"--app: [tool.flwr.app.config] has no key {key!r}; {suggest(key, run_config)}")
    return FlowerApp(folder.absolute(), components["serverapp"], components["clientapp"], {**run_config, **changes})


def run_app_folder(folder: Path, overrides: Mapping[str, Any], address: str | None) -> None:
    """Run the Flower app in a folder, as `raytrain federate --app` does.

    Args:
        folder: of the app.
        overrides: dotted fields of `AppRun`.
        address: of the Ray cluster; None or "local": one of this machine's processors.

    Raises:
        RecipeError: there is no app, it cannot be loaded, or a field is wrong.
        TrainingError: its server raised an exception.
    """
    run = AppRun.parse_with({}, overrides)
    app, clients = read_app(folder, dict(dotted_fields(run.config))), run.clients
    actors = ActorOptions(clients.actors, clients.cpus, clients.gpus)
    cluster = None if address == OWN_CLUSTER else address
    try:
        run_app(app, clients.count, actors, seed=run.seed, faults=run.faults, address=cluster, say=_say)
    except RaytrainError:
        raise
    except Exception as error:
        raise TrainingError(f"serverapp: {type(error).__name__}: {error}{error_location(error)}") from error


def _say(line: str) -> None:
    """Show a line at once, also where it is read by another process."""
    print(line, flush=True)


def run_app(
    app: FlowerApp,
    clients: int,
    actors: ActorOptions | None = None,
    *,
    seed: int = 0,
    faults: Faults | None = None,
    address: str | None = None,
    stopped: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = logger.warning,
) -> Context:
    """Run a user's Flower app with simulated clients, and return the context of its server.

    With equal seeds a run gives equal results, on however many actors, as far as the app draws from the global random
    streams of Python, NumPy and PyTorch, or from none.

    Args:
        app: the app.
        clients: how many there are.
        actors: how many actors serve them, and what each takes of the cluster.
        seed: of the global random streams, in the server and for each call of a client, and of faults.
        faults: that happen to clients in `send_and_receive`.
        address: of the Ray cluster; None: one of this machine's processors. Of no use in a process that is in one.
        stopped: returns whether the run is to stop, which raises `RunNotRunningException` in the server.
        say: shows the user a line: an exchange is over, an actor died, or the cluster is busy.

    Raises:
        RecipeError: the app cannot be loaded, or the cluster has no room for the actors.
    """
    with _first_on_path(app.folder), global_seed(seed):
        server = _component("serverapp", app.server, ServerApp)
        _component("clientapp", app.client, ClientApp)
        load, plan = partial(app.load_client, seed), ClientFaultPlan(faults or Faults(), seed)
        with (
            ray_session(address),
            AppGrid(load, clients, actors, app.run_config, plan=plan, stopped=stopped, say=say) as grid,
        ):
            return serve(server, grid, app.run_config, seed)


def _component(what: str, target: str, kind: type[ComponentT]) -> ComponentT:
    """Return an app of an app's folder.

    Raises:
        RecipeError: it cannot be imported, or is something else.
    """
    found = resolve({}, target, what)
    if not isinstance(found, kind):
        raise RecipeError(f"{what}: expected a {kind.__name__} at {target}; got {type(found).__name__}")
    return found


def serve(server: ServerApp, grid: Grid, run_config: UserConfig, seed: int) -> Context:
    """Run a server on a grid, and return its context.

    Args:
        server: the `ServerApp`.
        grid: through which it reaches its clients.
        run_config: its `context.run_config`.
        seed: of the global random streams, from which Flower's strategies sample clients.
    """
    context = Context(grid.run.run_id, SUPERLINK_NODE_ID, {}, RecordDict(), dict(run_config))
    gc.freeze()  # or else collections go through all that torch and Ray have imported, for each few thousand clients
    try:
        with global_seed(seed):
            server(grid, context)
    finally:
        gc.unfreeze()
    return context


@contextlib.contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before
