"""Runs a federated recipe: the server in this process, its clients on actors of a Ray cluster."""

import contextlib
import threading
import traceback
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Any

import torch
from flwr.supercore.run import RunNotRunningException

from federated.build import Federation, task_of
from federated.flower.channel import GridChannel
from federated.flower.client import load_clients
from federated.flower.preview import summary
from federated.launch.actor_pool import ActorOptions
from federated.launch.ray_grid import RayGrid
from federated.recipe import FederateRecipe
from federated.results import result_of
from federated.rounds import STATES
from federated.server import CommunicationRound, Server
from raytrain.errors import RaytrainError, TrainingError
from raytrain.kinds import Order
from raytrain.launch.resources import check_reachable
from raytrain.launch.session import OWN, ray_session
from raytrain.run.directory import RunDirectory
from raytrain.run.progress import Display, Wording
from raytrain.run.result import Result
from raytrain.training.build import options_from_data


def columns(row: Mapping[str, Any]) -> list[str]:
    """Return what is shown of a round, beside its evaluation."""
    if "heard" not in row:
        return []
    return [f"heard {row['heard']}", f"{row['bytes_down']:,} B down  {row['bytes_up']:,} B up"]


WORDING = Wording("federate", "federating", "round", "the run ends after the round that is going on", columns)


def run(recipe: FederateRecipe, order: Order) -> Result:
    """Play the rounds of a recipe on the Ray cluster at `order.address`, or on one of its own.

    Ctrl-C ends the run after the round that is going on; a second one ends it at once. Both can be resumed.

    Raises:
        RecipeError: the recipe, the folder or the cluster does not allow it.
        TrainingError: the run failed; what was saved is in its folder.
    """
    directory = RunDirectory(order.out.absolute())
    torch.set_num_threads(recipe.threads())
    recipe = recipe.with_overrides(options_from_data(task_of(recipe), directory))
    federation = Federation.of(recipe)
    address = None if order.address in (None, OWN) else order.address
    if address:
        check_reachable(address)
    with directory.opened(resume=order.resume), Display(directory, recipe.rounds, WORDING) as display:
        server = federation.server()
        server.resume(directory.path / STATES)
        display.say(summary(recipe, federation.partition))
        with ray_session(address):
            directory.begin(recipe.to_toml())
            error = _play(federation, server, directory, display)
        result = result_of(federation, server, directory, error)
        directory.write_result(result)
        display.finish(result)
    if error:
        raise TrainingError(f"{error}\n{server.model.version} rounds are saved in {directory.path}")
    return result


def _play(federation: Federation, server: Server, directory: RunDirectory, display: Display) -> str:
    """Play rounds while the display follows them, until the end or until the user stops them; return what failed."""
    recipe, at_once = federation.recipe, threading.Event()
    clients, faults = recipe.clients, recipe.faults
    factory = partial(load_clients, recipe.plain(), server.model)
    options = ActorOptions(clients.actors, clients.cpus, clients.gpus)
    with (
        RayGrid(factory, len(server.versions), options, stopped=at_once.is_set, say=display.say) as grid,
        federation.records(directory, server) as records,
    ):
        channel = GridChannel(grid, grid.get_node_ids(), faults.timeout_seconds, grid.end_actor)
        rounds = federation.rounds(server, channel).run(directory.path, records.add)
        directory.announce(recipe.to_toml(), server.model.version, [{"actors": grid.actors}])
        playing = Playing(rounds, directory.stop_requested)
        if not display.follow(playing.ended):
            at_once.set()
            playing.ended.wait()
    return playing.error


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
        except RunNotRunningException:
            pass  # a second Ctrl-C ended the round that was going on
        except RaytrainError as error:
            self.error = str(error)
        except Exception:
            self.error = traceback.format_exc()
        finally:
            self.ended.set()
