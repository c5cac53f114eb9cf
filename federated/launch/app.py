"""Runs Flower apps on the Ray cluster: a user's own folder as it is, and any `ServerApp` on a `RayGrid`."""

import contextlib
import gc
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfig, UserConfigValue
from flwr.common.config import get_fused_config_from_dir, get_project_config
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid, ServerApp

from federated.flower.seeding import SeededClient, global_seed, seed_globals
from federated.launch.actor_pool import ActorOptions
from federated.launch.ray_grid import RayGrid
from raytrain.errors import RecipeError
from raytrain.launch.session import ray_session
from raytrain.registry import resolve, suggest

logger = logging.getLogger(__name__)


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


def run_app(
    app: FlowerApp,
    clients: int,
    actors: ActorOptions | None = None,
    *,
    seed: int = 0,
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
        seed: of the global random streams, in the server and for each call of a client.
        address: of the Ray cluster; None: one of this machine's processors. Of no use in a process that is in one.
        stopped: returns whether the run is to stop, which raises `RunNotRunningException` in the server.
        say: shows the user a line: an actor died, or the cluster is busy.

    Raises:
        RecipeError: the app cannot be loaded, or the cluster has no room for the actors.
    """
    with _first_on_path(app.folder), ray_session(address), global_seed(seed):
        server = resolve({}, app.server, "serverapp")
        if not isinstance(server, ServerApp):
            raise RecipeError(f"serverapp: expected a ServerApp at {app.server}; got {type(server).__name__}")
        with RayGrid(partial(app.load_client, seed), clients, actors, app.run_config, stopped=stopped, say=say) as grid:
            return serve(server, grid, app.run_config, seed)


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
