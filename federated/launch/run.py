"""Runs a federated recipe: the server in this process, its clients on actors of a Ray cluster."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from flwr.supercore.run import RunNotRunningException

from federated.build import task_of
from federated.flower.runs import FederatedRun, run_of
from federated.launch.actor_pool import ActorOptions
from federated.launch.ray_grid import RayGrid
from federated.preview import advice_on_learning_rate, run_summary
from federated.recipe import FederateRecipe
from federated.records import PARTITION, RunRecords, write_partition
from federated.results import result_of
from raytrain.kinds import RunOptions
from raytrain.launch.resources import check_reachable
from raytrain.launch.session import OWN_CLUSTER, ray_session
from raytrain.launch.supervise import supervise
from raytrain.run.directory import Failure, RunDirectory
from raytrain.run.progress import ProgressDisplay, Wording
from raytrain.run.result import Result
from raytrain.training.build import options_from_data


def federated_columns(row: Mapping[str, Any]) -> list[str]:
    """Return what is shown of a round, beside its evaluation."""
    if "heard" not in row:
        return []
    return [f"heard {row['heard']}", f"{row['bytes_down']:,} B down  {row['bytes_up']:,} B up"]


def federated_wording(recipe: FederateRecipe) -> Wording:
    """Return how the progress of a run is shown."""
    on_stop = "the run ends after the round that is going on"
    return Wording(
        "federate",
        "federating",
        "round",
        on_stop,
        federated_columns,
        workers="the clients",
        saved="the last round",
        advice=partial(advice_on_learning_rate, recipe),
    )


def run_federated(recipe: FederateRecipe, order: RunOptions) -> Result:
    """Play the rounds of a recipe on the Ray cluster at `order.address`, or on one of its own.

    Ctrl-C ends the run after the round that is going on; a second one ends it at once. Both can be resumed.

    Raises:
        RaytrainError: as `supervise`.
    """
    directory = RunDirectory(order.out.absolute())
    torch.set_num_threads(recipe.threads())
    recipe = recipe.with_overrides(options_from_data(task_of(recipe), directory))
    federation = run_of(recipe)
    address = None if order.address in (None, OWN_CLUSTER) else order.address
    if address:
        check_reachable(address)

    def result(failure: Failure | None) -> Result:
        size, done = federation.parameter_bytes(), federation.is_done()
        return result_of(directory, federation.task, size, done=done, error=failure.message if failure else "")

    return supervise(
        directory,
        recipe.to_toml(),
        partial(_in_cluster, recipe, federation, directory, address),
        ProgressDisplay(directory, recipe.rounds, federated_wording(recipe)),
        result,
        resume=order.resume,
    )


@contextlib.contextmanager
def _in_cluster(
    recipe: FederateRecipe,
    federation: FederatedRun,
    directory: RunDirectory,
    address: str | None,
    say: Callable[[str], None],
) -> Iterator[Callable[[], "Playing"]]:
    """Be in a Ray cluster inside the `with` block, whose value starts the rounds.

    Raises:
        RecipeError: it cannot be joined, or the folder holds another run.
    """
    federation.resume(directory.path)
    say(run_summary(recipe, federation.partition))
    with ray_session(address):
        yield partial(Playing, recipe, federation, directory, say)


class Playing(threading.Thread):
    """Plays rounds beside the main thread, which keeps Ctrl-C for itself.

    Args:
        recipe: of the run.
        federation: at the round that the run begins at or goes on from.
        directory: the run's folder.
        say: shows the user a line.

    Attributes:
        ended: set at the end.
        error: nothing; what fails is left in the run's folder.
    """

    def __init__(
        self, recipe: FederateRecipe, federation: FederatedRun, directory: RunDirectory, say: Callable[[str], None]
    ) -> None:
        super().__init__(daemon=True)
        self.error = ""
        self.ended = threading.Event()
        self._stop_at_once = threading.Event()
        self._recipe, self._federation, self._directory, self._say = recipe, federation, directory, say
        self.start()

    def run(self) -> None:
        """Play until the last round, or the first after which a stop was requested."""
        try:
            if not self._federation.is_done():
                self._play()
        except RunNotRunningException:
            pass  # it was closed
        except Exception as error:
            self._directory.record_failure(error, 0)
        finally:
            self.ended.set()

    def close(self) -> None:
        """End the round that is going on, if there is one."""
        self._stop_at_once.set()
        self.ended.wait()

    def _play(self) -> None:
        """Start actors, and play rounds on them."""
        clients, count = self._recipe.clients, self._federation.partition.clients
        options, factory = ActorOptions(clients.actors, clients.cpus, clients.gpus), self._federation.client_factory()
        with RayGrid(factory, count, options, stopped=self._stop_at_once.is_set, say=self._say) as grid:
            self._directory.record_attempt(self._recipe.to_toml(), self._federation.version, [{"actors": grid.actors}])
            data = self._federation.task.data("train")
            write_partition(self._directory.path / PARTITION, self._federation.partition, data)
            with RunRecords(self._directory, self._federation, every=self._recipe.evaluation.every) as records:
                self._play_on(grid, records)

    def _play_on(self, grid: RayGrid, records: RunRecords) -> None:
        rounds = self._federation.play(
            grid,
            grid.get_node_ids(),
            self._directory.path,
            records.add,
            end_process=grid.end_actor,
            late_answers=grid.late_answers,
        )
        with contextlib.closing(rounds):
            for _ in rounds:
                if self._directory.stop_requested():
                    break
