"""Zeroth-order protocols in a Flower program of the user's own: a strategy for its `ServerApp`, and the clients' app.

    strategy = FedKSeed(task, rounds=40, clients={"count": 100, "per_round": 10}, optimizer={"lr": 1e-2})
    client_app = strategy.client_app()
    server_app = ServerApp()

    @server_app.main()
    def main(grid, context):
        model = strategy.start(grid)

Each class is a protocol of `raytrain list protocols`, and the run that of a recipe with the same fields, to the bit.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import PARTITION_ID_KEY
from flwr.serverapp import Grid
from torch import nn

from federated.build import Federation
from federated.client import LocalTrainer
from federated.flower.client import TrainingClient
from federated.flower.deployed import WHO, introduction
from federated.flower.introductions import nodes_of
from federated.flower.seed_run import SeedRun
from federated.recipe import FederateRecipe
from federated.server import CommunicationRound
from raytrain.by_value import name_objects
from raytrain.errors import RecipeError
from raytrain.recipe import dotted_fields
from raytrain.seeds.seed_model import SeedModel
from raytrain.tasks.task import Task

logger = logging.getLogger(__name__)


class SeedStrategy:
    """A zeroth-order protocol, whose clients send numbers along seeds.

    Server and clients construct it from equal arguments; what follows from them is not sent.

    Args:
        task: a task, or the name of one, also as a mapping with its options.
        fields: of a federated recipe, as of `raytrain.federate`: `rounds=40`, `protocol={"local_steps": 20}`.

    Attributes:
        recipe: of the run.

    Raises:
        RecipeError: a field is wrong.
    """

    name: ClassVar[str]
    """Of the protocol in a recipe."""

    def __init__(self, task: Task | str | Mapping[str, Any], **fields: Any) -> None:
        given = dict(dotted_fields(name_objects(fields)))
        if given.pop("protocol", self.name) != self.name or given.setdefault("protocol.name", self.name) != self.name:
            raise RecipeError(f"protocol.name: expected {self.name}, of {type(self).__name__}; leave it out")
        self.recipe = FederateRecipe.parse_with({"kind": "federate", "task": name_objects(task)}, given)

    def client_app(self) -> ClientApp:
        """Return the app of all clients; client i has the examples of partition i."""
        app = ClientApp()

        @app.train()
        def answer(message: Message, context: Context) -> Message:
            return TrainingClient(self._trainer)(message, context)

        @app.query(WHO)
        def who(message: Message, context: Context) -> Message:
            client = int(context.node_config[PARTITION_ID_KEY])
            return Message(introduction(client, self._trainer.newest.origin), reply_to=message)

        return app

    def start(
        self,
        grid: Grid,
        *,
        nodes: Sequence[int] | None = None,
        folder: Path | None = None,
        record: Callable[[CommunicationRound], None] = lambda done: None,  # noqa: ARG005
        wait_seconds: float = 120.0,
    ) -> nn.Module:
        """Play the rounds with the clients that a grid reaches, and return the model.

        Args:
            grid: of the `ServerApp`, or a `RayGrid`.
            nodes: the node of each client, as `RayGrid.get_node_ids` returns them; None: the clients are asked.
            folder: to resume from, if the process is killed; None: nothing is left.
            record: called with each round.
            wait_seconds: for all clients to be there, where they are asked.

        Raises:
            RecipeError: not all clients are there, or the folder holds another run.
            CheckpointError: the folder cannot be written to, or holds something damaged.
        """
        run = self._run
        with tempfile.TemporaryDirectory() as temporary:
            place = folder or Path(temporary)
            run.resume(place)
            known = nodes_of(grid, run, wait_seconds) if nodes is None else nodes
            for done in run.play(grid, known, place, record):
                heard, total = len(done.heard), len(done.clients)
                logger.info("round %d/%d: heard %d of %d", done.number + 1, self.recipe.rounds, heard, total)
        return self.module()

    def evaluate(self) -> dict[str, float]:
        """Return what the task measures of the newest model, on held-out examples."""
        return self._run.evaluate()

    def module(self) -> nn.Module:
        """Return the newest model."""
        federation = self._run.federation
        return federation.model.set_to_seeds(self.seed_model())

    def seed_model(self) -> SeedModel:
        """Return the newest model as seeds and coefficients, which take kilobytes."""
        return self._run.federation.seed_model(self._run.server)

    def __getstate__(self) -> dict[str, Any]:
        """Return what an actor needs that serves clients."""
        return self.recipe.to_dict()

    def __setstate__(self, recipe: Mapping[str, Any]) -> None:
        """Be a strategy that has not begun."""
        self.recipe = FederateRecipe.parse(recipe)

    @cached_property
    def _run(self) -> SeedRun:
        return SeedRun(self.recipe)

    @cached_property
    def _trainer(self) -> LocalTrainer:
        return Federation.of(self.recipe, self.recipe.device()).trainer()


class FedKSeed(SeedStrategy):
    """Local steps along a pool of seeds (Qin et al. 2024).

    >>> strategy = FedKSeed("digits", rounds=2, clients={"count": 8, "per_round": 4}, protocol={"local_steps": 20})
    >>> grid = InProcessGrid(strategy.client_app(), clients=8)
    >>> model = strategy.start(grid, nodes=grid.get_node_ids())
    >>> model(torch.zeros(3, 1, 8, 8)).shape, len(strategy.seed_model().seeds)
    (torch.Size([3, 10]), 155)
    """

    name = "fedkseed"


class FedKSeedPro(SeedStrategy):
    """The same along seeds that the server draws, those with large projected gradients more often (Qin et al. 2024).

    >>> FedKSeedPro("digits", clients={"count": 8, "per_round": 4}).recipe.protocol.pool
    4096
    """

    name = "fedkseed-pro"


class CommonSeeds(SeedStrategy):
    """Equal seeds for all clients of a round, of which the server sends the mean (Li et al. 2025, DeComFL).

    >>> CommonSeeds("digits", protocol={"local": True}).recipe.protocol.local
    True
    """

    name = "common-seeds"


class Sign(SeedStrategy):
    """Votes of one bit on equal seeds (Cai et al. 2025, FeedSign).

    >>> Sign("digits", clients={"per_round": 9}).recipe.protocol.name
    'sign'
    """

    name = "sign"
