"""A run whose clients send numbers along seeds: the server of `federated.server` over a Flower `Grid`."""

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.serverapp import Grid

from federated.build import Federation
from federated.channel import LateAnswer
from federated.evaluation import KeepScores, forget
from federated.flower.channel import GridChannel, GridMessenger, nobody, nothing_late
from federated.flower.client import TrainingClient
from federated.global_model import GlobalModel
from federated.recipe import FederateRecipe
from federated.records import SEEDS
from federated.rounds import STATES
from federated.server import CommunicationRound


class SeedRun:
    """A run of a zeroth-order protocol.

    Args:
        recipe: of the run.

    Raises:
        RecipeError: it does not fit the data or the model.
    """

    def __init__(self, recipe: FederateRecipe) -> None:
        self.federation = Federation.of(recipe)
        self.task, self.partition = self.federation.task, self.federation.partition
        self.server = self.federation.server()

    @property
    def version(self) -> int:
        """Return how many rounds are done."""
        return self.server.model.version

    def is_done(self) -> bool:
        """Return whether all rounds are."""
        return self.server.is_done()

    def resume(self, folder: Path) -> None:
        """Take back the newest state in a run's folder, if there is one."""
        self.server.resume(folder / STATES)

    def check_origin(self, client: int, origin: str) -> None:
        """Refuse a client that begins with something else; see `check_same_origin`."""
        self.server.check_origin(client, origin)

    def evaluate(self, keep: KeepScores = forget) -> dict[str, float]:
        """Return what the task measures of the newest model."""
        return self.federation.evaluate(self.server, keep)

    def save_model(self, folder: Path) -> None:
        """Write the newest model, as seeds and coefficients."""
        self.federation.seed_model(self.server).save(folder / SEEDS)

    def parameter_bytes(self) -> int:
        """Return the size of the parameters that the run moves."""
        return self.federation.parameter_bytes()

    def client_factory(self) -> Callable[[], Callable[[Message, Context], Message]]:
        """Return what makes the clients, in a process that serves any number of them."""
        return partial(load_seed_clients, self.federation.recipe.to_dict(), self.server.model)

    def play(
        self,
        grid: Grid,
        nodes: Sequence[int],
        folder: Path,
        record: Callable[[CommunicationRound], None],
        end_process: Callable[[int], None] = nobody,
        late_answers: Callable[[], Sequence[LateAnswer]] = nothing_late,
    ) -> Generator[CommunicationRound]:
        """Play rounds to the end, and yield each when it is saved; see `GridMessenger` and `Rounds.run`."""
        messenger = GridMessenger(grid, nodes, self.federation.recipe.faults.timeout_seconds, end_process, late_answers)
        return self.federation.rounds(self.server, GridChannel(messenger)).run(folder, record)


def load_seed_clients(recipe: Mapping[str, Any], model: GlobalModel) -> TrainingClient:
    """Return the clients of a run, in a process that serves any number of them.

    Args:
        recipe: as `Recipe.to_dict` returns it.
        model: the newest, which clients of a run that goes on have already.

    Raises:
        RecipeError: the recipe does not fit the data or the model, or the server has other first weights.
    """
    parsed = FederateRecipe.parse(recipe)
    torch.set_num_threads(parsed.threads())
    trainer = Federation.of(parsed, parsed.device()).trainer()
    trainer.start_from(model)
    return TrainingClient(trainer)
