"""Runs a federated recipe: the server in this process, its clients on actors of a Ray cluster."""

import contextlib
import threading
import traceback
from collections.abc import Callable, Generator
from functools import partial

import torch

from federated.build import Federation
from federated.flower.channel import GridChannel
from federated.flower.client import load_clients
from federated.launch.actor_pool import ActorOptions
from federated.launch.ray_grid import RayGrid
from federated.recipe import FederateRecipe
from federated.records import RunRecords
from federated.results import result_of
from federated.rounds import STATES
from federated.server import CommunicationRound, Server
from raytrain.errors import RaytrainError, TrainingError
from raytrain.kinds import Order
from raytrain.launch.session import OWN, ray_session
from raytrain.run.directory import RunDirectory
from raytrain.run.progress import Display
from raytrain.run.result import Result


def run(recipe: FederateRecipe, order: Order) -> Result:
    """Play the rounds of a recipe on the Ray cluster at `order.address`, or on one of its own.

    Ctrl-C ends the run after the round that is going on; a second one ends it at once. Both can be resumed.

    Raises:
        RecipeError: the recipe, the folder or the cluster does not allow it.
        TrainingError: the run failed; what was saved is in its folder.
    """
    directory = RunDirectory(order.out.absolute())
    torch.set_num_threads(recipe.threads())
    federation = Federation.of(recipe)
    with directory.opened(resume=order.resume), Display(directory, recipe.rounds) as display:
        server = federation.server()
        server.resume(directory.path / STATES)
        with ray_session(None if order.address in (None, OWN) else order.address):
            directory.begin(recipe.to_toml())
            playing = _play(federation, server, directory, display)
        result = result_of(federation, server, directory, playing.error)
        directory.write_result(result)
        display.finish(result)
    if playing.error:
        raise TrainingError(f"{playing.error}\nthe state after round {server.model.version} is in {directory.path}")
    return result


def _play(federation: Federation, server: Server, directory: RunDirectory, display: Display) -> "Playing":
    """Play rounds while the display follows them, until the end or until the user stops them."""
    recipe, at_once = federation.recipe, threading.Event()
    clients, options = recipe.clients, ActorOptions(recipe.clients.actors, recipe.clients.cpus, recipe.clients.gpus)
    factory = partial(load_clients, recipe.plain(), server.model)
    with RayGrid(factory, len(server.versions), options, stopped=at_once.is_set, say=display.say) as grid:
        directory.announce(recipe.to_toml(), server.model.version, [{"clients": clients.count}])
        channel = GridChannel(grid, grid.get_node_ids(), recipe.faults.timeout_seconds, grid.end_actor)
        records = RunRecords(
            directory,
            server,
            partial(federation.evaluate, server),
            partial(federation.seed_model, server),
            every=recipe.evaluation.every,
        )
        with records:
            playing = Playing(
                federation.rounds(server, channel).run(directory.path, records.add), directory.stop_requested
            )
            if not display.follow(playing.ended):
                at_once.set()
            playing.ended.wait()
    return playing


class Playing(threading.Thread):
    """Plays rounds beside the main thread, which keeps Ctrl-C for itself.

    Args:
        rounds: plays one for each item.
        stop_requested: returns whether to end after the round that is going on.

    Attributes:
        ended: set at the end.
        error: why it ended, if it was not well.
    """

    def __init__(self, rounds: Generator[CommunicationRound], stop_requested: Callable[[], bool]) -> None:
        super().__init__(daemon=True)
        self.error = ""
        self.ended = threading.Event()
        self._rounds = rounds
        self._stop_requested = stop_requested
        self.start()

    def run(self) -> None:
        """Play until the last round, or the first after which a stop was requested."""
        try:
            with contextlib.closing(self._rounds) as rounds:
                for _ in rounds:
                    if self._stop_requested():
                        break
        except RaytrainError as error:
            self.error = str(error)
        except Exception:
            self.error = traceback.format_exc()
        finally:
            self.ended.set()
