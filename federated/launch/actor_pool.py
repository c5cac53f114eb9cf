"""Actors that serve clients side by side: their places on the cluster, and a new one where one has died."""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import ray
from flwr.app import Error
from flwr.common.constant import ErrorCode
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from federated.flower.identity import FIRST_NODE
from federated.launch.client_actor import ClientActor, ClientFactory, ClientOutcome, ClientPopulation
from federated.launch.outbox import OUTBOX_POLL_SECONDS, Outbox, Pending
from raytrain.errors import RecipeError

ACTORS_PER_GPU = 2
PATIENCE_SECONDS = 10.0
"""How long an actor may go on with clients that nobody waits for: about what a new one takes to start."""


@dataclass(frozen=True, slots=True)
class ActorOptions:
    """How many actors serve the clients, and what each takes of the cluster.

    Attributes:
        count: how many; 0: as many as there is room for now, with GPUs at most two for each.
        cpus: processors of each; fractions share one.
        gpus: GPUs of each; fractions share one.

    >>> ActorOptions(count=2, cpus=0.5).amounts()
    {'CPU': 0.5}
    """

    count: int = 0
    cpus: float = 1.0
    gpus: float = 0.0

    def amounts(self) -> dict[str, float]:
        """Return what an actor takes, by the cluster's names."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def actor_count(options: ActorOptions, nodes: Sequence[Mapping[str, float]], free: Mapping[str, float]) -> int:
    """Return how many actors to start.

    Args:
        options: what is asked for.
        nodes: what each machine of the cluster has.
        free: what of it nobody uses now.

    Raises:
        RecipeError: the cluster has no room for them, and they would wait for ever.
    """
    amounts = options.amounts()
    room = sum(_fitting(node, amounts) for node in nodes)
    if room < max(options.count, 1):
        each, there = _format(amounts), _format({name: sum(node.get(name, 0) for node in nodes) for name in amounts})
        way_out = f"set clients.actors={room}" if room else "set fewer for each"
        raise RecipeError(
            f"clients.actors: {max(options.count, 1)} actor(s) of {each} each do not fit on {len(nodes)} machine(s) "
            f"with {there}; {way_out}"
        )
    most = ACTORS_PER_GPU * int(sum(node.get("GPU", 0) for node in nodes)) if options.gpus else room
    return options.count or max(1, min(_fitting(free, amounts), most, room))


def _fitting(there: Mapping[str, float], amounts: Mapping[str, float]) -> int:
    """Return how many actors fit, counted as Ray does: in ten-thousandths."""
    wanted = {name: round(amount * 10_000) for name, amount in amounts.items() if amount}
    return min(round(there.get(name, 0) * 10_000) // amount for name, amount in wanted.items())


def _format(amounts: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items())


class ActorPool:
    """Actors that serve the messages of an outbox, in places that are reserved for them together.

    Args:
        options: how many, and what each takes.
        factory: of the clients' app.
        population: the clients.
        raise_if_stopped: called now and then while the pool waits; ends the waiting by an exception.
        say: shows the user a line.

    Raises:
        RecipeError: the cluster has no room for the actors, or the app cannot be loaded.
    """

    def __init__(
        self,
        options: ActorOptions,
        factory: ClientFactory,
        population: ClientPopulation,
        raise_if_stopped: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        free, amounts = ray.available_resources(), options.amounts()
        self.count = actor_count(options, nodes, free)
        if _fitting(free, amounts) < self.count:
            say(f"the cluster is busy: waiting for {self.count} actor(s) of {_format(amounts)} each")
        self.outbox = Outbox(self.count)
        self._options, self._factory, self._population, self._say = options, factory, population, say
        self._threads: list[ActorThread] = []
        self._places = placement_group([amounts] * self.count)
        try:
            while not self._places.wait(OUTBOX_POLL_SECONDS):
                raise_if_stopped()
            starts = [self._start(place) for place in range(self.count)]
            _await_all([loaded for _, loaded in starts], raise_if_stopped)
            self._threads = [
                ActorThread(self.outbox, start, partial(self._restart, place)) for place, start in enumerate(starts)
            ]
        except BaseException:
            self.close()
            raise

    def supervise(self) -> None:
        """End actors that hold up others.

        Raises:
            Exception: that of a thread that has failed.
        """
        for thread in self._threads:
            thread.supervise()

    def end_actor(self, number: int) -> None:
        """End one of the actors, by a number of which the rest of a division by their count matters."""
        self._threads[number % self.count].end_actor()

    def close(self) -> None:
        """End the actors."""
        self.outbox.close()
        if ray.is_initialized():  # an app may have ended the connection
            for thread in self._threads:
                thread.end_actor()
            remove_placement_group(self._places)
        for thread in self._threads:
            thread.join()

    def _start(self, place: int) -> tuple[ActorHandle, ray.ObjectRef]:
        """Start an actor; return it, and a reference to wait for until it has loaded the app."""
        strategy = PlacementGroupSchedulingStrategy(self._places, placement_group_bundle_index=place)
        options = {"num_cpus": self._options.cpus, "num_gpus": self._options.gpus, "scheduling_strategy": strategy}
        actor = ray.remote(ClientActor).options(**options).remote([os.path.abspath(path) for path in sys.path])
        return actor, actor.load.remote(self._factory, self._population)

    def _restart(self, place: int) -> tuple[ActorHandle, ray.ObjectRef]:
        self._say("an actor died; starting another in its place")
        return self._start(place)


def _await_all(refs: list[ray.ObjectRef], raise_if_stopped: Callable[[], None]) -> None:
    """Wait for objects.

    Raises:
        RecipeError: one of them is an error.
    """
    while refs:
        ready, refs = ray.wait(refs, timeout=OUTBOX_POLL_SECONDS)
        raise_if_stopped()
        try:
            ray.get(ready)
        except RayError as error:
            cause = _cause(error)
            raise cause if isinstance(cause, RecipeError) else RecipeError(f"an actor cannot start: {cause}") from error


def _cause(error: RayError) -> BaseException:
    """Return what an actor raised, without Ray's traces."""
    cause: BaseException = error.cause if isinstance(error, RayTaskError) else error
    return cause


class ActorThread(threading.Thread):
    """Hands messages to an actor, keeps its answers, and replaces it when it has died.

    Args:
        outbox: the messages.
        started: an actor, and a reference to wait for until it is ready.
        start: starts another one.
    """

    def __init__(
        self,
        outbox: Outbox,
        started: tuple[ActorHandle, ray.ObjectRef],
        start: Callable[[], tuple[ActorHandle, ray.ObjectRef]],
    ) -> None:
        super().__init__(daemon=True)
        self._outbox = outbox
        self._actor, self._loading = started
        self._start_actor = start
        self._held: Sequence[Pending] = ()
        self._failure: Exception | None = None
        self.start()

    def run(self) -> None:
        """Serve until the outbox is closed; an exception waits for `supervise`."""
        paces: dict[str, float] = {}  # in which the sending of messages and answers is included
        try:
            while messages := self._outbox.next_batch(paces):
                self._held, began = messages, time.monotonic()
                outcome = self._serve(messages)
                self._held, seconds = (), time.monotonic() - began
                self._outbox.answer(messages, outcome.answers, outcome.states)
                paces[messages[0].type] = len(outcome.answers) / seconds
        except Exception as error:  # whatever it is: without this thread, messages would be waited for without end
            self._failure = error

    def supervise(self) -> None:
        """End the actor if nobody has waited for its replies for long, so that another takes its place.

        Raises:
            Exception: the one that ended this thread.
        """
        if self._failure is not None:
            raise self._failure
        since = time.monotonic() - PATIENCE_SECONDS
        held = self._held
        if held and all(message.given_up_at is not None and message.given_up_at < since for message in held):
            self.end_actor()

    def end_actor(self) -> None:
        """End the actor, whatever it does."""
        ray.kill(self._actor)

    def _serve(self, messages: Sequence[Pending]) -> ClientOutcome:
        """Return what the actor makes of messages; an error for each of them if it dies."""
        try:
            ray.get(self._loading)
            outcome: ClientOutcome = ray.get(self._actor.serve.remote(self._outbox.batch_of(messages)))
            return outcome
        except RayActorError:
            if not self._outbox.closed:
                self._actor, self._loading = self._start_actor()
            code, reason = ErrorCode.CLIENT_APP_CRASHED, "its actor died: killed, out of memory, or crashed"
        except RayError as error:
            code, reason = ErrorCode.UNKNOWN, f"its actor failed: {_cause(error)}"
        return ClientOutcome([Error(code, f"client {message.node - FIRST_NODE}: {reason}") for message in messages])
