"""The actor that plays clients: it loads their app once and calls it once for each message."""

import gc
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, ErrorCode

from federated.flower.envelope import Fields, message_of
from federated.flower.identity import FIRST_NODE, assume_identity
from federated.flower.records import FlatContent, flatten_all, restore
from federated.launch.contents import Content, Unpacker
from raytrain.errors import RecipeError
from raytrain.registry import error_location, resolve

MIN_BATCH_SECONDS, MAX_BATCH_SECONDS = 0.02, 0.25
MAX_REASON_CHARACTERS = 2000

Client = Callable[[Message, Context], Message]
"""A `ClientApp`, or any function with its signature."""

ClientFactory = str | Callable[[], Client]
"""Where a client is: "module:attribute", or a function that returns it and that Ray can send to an actor."""


@dataclass(frozen=True, slots=True)
class ClientPopulation:
    """What all clients of a run have in common.

    Attributes:
        clients: how many there are; client i is node i + FIRST_NODE and has partition i.
        run_config: each client's `context.run_config`.
    """

    clients: int
    run_config: UserConfig

    def nodes(self) -> range:
        """Return the ids of the clients' nodes."""
        return range(FIRST_NODE, FIRST_NODE + self.clients)

    def context(self, run_id: int, node: int, state: RecordDict) -> Context:
        """Return the context of a client for one call."""
        node_config: UserConfig = {PARTITION_ID_KEY: node - FIRST_NODE, NUM_PARTITIONS_KEY: self.clients}
        return Context(run_id, node, node_config, state, dict(self.run_config))


@dataclass(frozen=True, slots=True)
class MessageBatch:
    """Messages for an actor.

    Attributes:
        fields: of the metadata of each message.
        contents: of each message.
        states: node -> what its client left in `context.state`; empty where there is nothing.
    """

    fields: list[Fields]
    contents: list[Content]
    states: dict[int, FlatContent]


FlatAnswer = FlatContent | Error
"""What a client answered: records, or the error in their place."""


@dataclass(frozen=True, slots=True)
class ClientOutcome:
    """What the clients of a batch answered.

    Attributes:
        answers: to the first messages of the batch; an actor that runs out of time leaves the others unserved.
        states: node -> what its client has left in `context.state`, for those that have or had something there.
    """

    answers: list[FlatAnswer] = field(default_factory=list)
    states: dict[int, FlatContent] = field(default_factory=dict)


class ClientActor:
    """Serves any number of clients, one after the other.

    Args:
        paths: where modules are imported from, as in the process that starts the actor.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        sys.path[:] = [*paths, *(path for path in sys.path if path not in paths)]
        logging.getLogger("flwr").setLevel(logging.WARNING)  # Flower's mods write a line for each client
        self._unpacker = Unpacker()

    def load(self, factory: ClientFactory, population: ClientPopulation) -> None:
        """Load the clients' app.

        Args:
            factory: of the app. As an argument of the constructor it would be unpickled before `paths` is known.
            population: the clients.

        Raises:
            RecipeError: it cannot be imported, or raises an exception.
        """
        self._population = population
        self._client = _load(factory)
        gc.freeze()  # Flower collects garbage for each client that empties a record: 0.2 s with all that is imported

    def serve(self, batch: MessageBatch) -> ClientOutcome:
        """Call the app for the messages of a batch, in their order, until its time is up; at least for the first."""
        outcome = ClientOutcome()
        contents = self._unpacker.unpack(batch.contents)
        end = time.monotonic() + MAX_BATCH_SECONDS
        for fields, content in zip(batch.fields, batch.contents, strict=True):
            if outcome.answers and time.monotonic() > end:
                break
            outcome.answers.append(self._answer(fields, restore(contents[id(content)]), batch, outcome))
        return outcome

    def _answer(self, fields: Fields, content: RecordDict, batch: MessageBatch, outcome: ClientOutcome) -> FlatAnswer:
        """Return the answer of a client to a message."""
        node: int = fields["_dst_node_id"]
        before = batch.states.get(node)
        assume_identity(fields["_run_id"], node)
        try:
            context = self._population.context(fields["_run_id"], node, restore(before or {}))
            answer = _content_of(self._client(message_of(fields, content), context), node)
            state = flatten_all(context.state)
        except (Exception, SystemExit) as error:
            return client_error(node, error)
        if state or before is not None:
            batch.states[node] = outcome.states[node] = state
        return answer


def client_error(node: int, error: BaseException) -> Error:
    """Return the error of a client whose app raised an exception."""
    text = f"{type(error).__name__}: {error}"[:MAX_REASON_CHARACTERS]
    reason = f"client {node - FIRST_NODE}: {text}{error_location(error)}"
    return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)


def _content_of(reply: Any, node: int) -> FlatAnswer:
    """Return what a client answered, apart from what it may use again for the next one."""
    if not isinstance(reply, Message):
        return client_error(node, TypeError(f"expected a Message in return; got {type(reply).__name__}"))
    return reply.error if reply.has_error() else flatten_all(reply.content)


def _load(factory: ClientFactory) -> Client:
    if isinstance(factory, str):
        found: Client = resolve({}, factory, "client")
        return found
    try:
        return factory()
    except RecipeError:
        raise
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"client: cannot be loaded: {type(error).__name__}: {error}{error_location(error)}"
        ) from error
