"""A Flower `Grid` whose clients are played by actors on the Ray cluster that this process is connected to."""

import logging
from collections.abc import Callable, Iterable
from itertools import count
from types import TracebackType
from typing import Self

from flwr.app import Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run, RunNotRunningException

from federated.channel import LateAnswer
from federated.flower.envelope import stamp
from federated.flower.identity import FIRST_NODE, assume_identity
from federated.launch.actor_pool import ActorOptions, ActorPool
from federated.launch.client_actor import ClientFactory, ClientPopulation
from federated.launch.contents import pack_contents
from federated.launch.outbox import Pending

RUN_ID = 1

logger = logging.getLogger(__name__)


class RayGrid(Grid):
    """Sends lists of messages to a few actors, each of which serves any number of clients, one after the other.

    It runs any `ServerApp` and `ClientApp`. A client that is not asked costs nothing. The connection to Ray is left as
    it is.

    Args:
        client: where the clients' app is; it is loaded once for each actor.
        clients: how many there are.
        actors: how many actors serve them, and what each takes of the cluster.
        run_config: each client's `context.run_config`.
        stopped: returns whether the run is to stop, which ends all waiting.
        say: shows the user a line: an actor died, or the cluster is busy.

    Raises:
        RecipeError: the cluster has no room for the actors, or the app cannot be loaded.

    >>> strategy = FedKSeed("digits", rounds=1, clients={"count": 8, "per_round": 4}, protocol={"local_steps": 20})
    >>> with RayGrid(strategy.client_app, clients=8, actors=ActorOptions(1, cpus=0.5)) as grid:
    ...     model = strategy.start(grid, nodes=grid.get_node_ids())
    >>> strategy.evaluate().keys()
    dict_keys(['loss', 'accuracy'])
    """

    def __init__(
        self,
        client: ClientFactory,
        clients: int,
        actors: ActorOptions | None = None,
        run_config: UserConfig | None = None,
        *,
        stopped: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self._population = ClientPopulation(clients, dict(run_config or {}))
        self._stopped = stopped
        self._numbers = count(1)
        self.set_run(Run.create_empty(RUN_ID))
        self._pool = ActorPool(actors or ActorOptions(), client, self._population, self._raise_if_stopped, say)

    def __enter__(self) -> Self:
        """Return the grid."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the actors."""
        self.close()

    def close(self) -> None:
        """End the actors."""
        self._pool.close()

    @property
    def actors(self) -> int:
        """Return how many actors serve the clients."""
        return self._pool.count

    def end_actor(self, client: int) -> None:
        """End an actor that may serve a client; another one takes its place when it has messages to serve."""
        self._pool.end_actor(client)

    def late_answers(self) -> list[LateAnswer]:
        """Return what was answered since the last call to messages that were no longer waited for, all of a round."""
        return [LateAnswer(node - FIRST_NODE, int(group)) for node, group in self._pool.outbox.collect_late()]

    def set_run(self, run: Run) -> None:
        """Set the run, whose id the messages bear that this process constructs."""
        self._run = run
        assume_identity(run.run_id)

    @property
    def run(self) -> Run:
        """Return the run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message; Flower recommends its constructor instead."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> range:
        """Return the ids of the clients' nodes; that of client i is node i of them."""
        return self._population.nodes()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages, and return their ids in the same order.

        A message to a node that is not there is answered with an error.

        Raises:
            RunNotRunningException: the run is to stop.
        """
        self._supervise()
        outgoing = list(messages)
        contents = pack_contents([message.content for message in outgoing])
        pending = [
            Pending(stamp(message, str(next(self._numbers))), contents[id(message.content)]) for message in outgoing
        ]
        nodes, outbox = self.get_node_ids(), self._pool.outbox
        for message in pending:
            if message.node not in nodes:
                reason = f"node {message.node}: expected one from {nodes.start} to {nodes.stop - 1}"
                outbox.fail(message, Error(ErrorCode.NODE_UNAVAILABLE, reason))
        outbox.post([message for message in pending if message.node in nodes])
        return [message.id for message in pending]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to messages that are there by now, each of them once.

        Raises:
            RunNotRunningException: the run is to stop.
        """
        self._supervise()
        return self._pool.outbox.collect(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages, and return the replies in the order of the messages.

        A list and no iterator: some strategies go through it twice.

        Args:
            messages: to send.
            timeout: how long to wait for replies, in seconds; None: until each message has one. Later replies are
                dropped, and messages that no actor has got yet are withdrawn.

        Raises:
            RunNotRunningException: the run is to stop.
        """
        message_ids = self.push_messages(messages)
        self._pool.outbox.wait(message_ids, timeout, self._supervise)
        return self._pool.outbox.collect(message_ids)

    def _supervise(self) -> None:
        """Replace actors that are stuck, and raise what ends all waiting."""
        self._raise_if_stopped()
        self._pool.supervise()

    def _raise_if_stopped(self) -> None:
        if self._stopped():
            raise RunNotRunningException
