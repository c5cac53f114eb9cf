"""A run in one process: every message is the bytes that would travel, and clients are served one after the other."""

from collections.abc import Callable

from federated.client import LocalTrainer
from federated.faults import FaultPlan, ProcessLostError
from federated.server import CommunicationRound, Outcome, Server


class Simulation:
    """Plays rounds in this process.

    Args:
        server: of the run.
        make_trainer: returns a process's trainer, in place of one that was lost.
        faults: that happen.
    """

    def __init__(self, server: Server, make_trainer: Callable[[], LocalTrainer], faults: FaultPlan) -> None:
        self._server = server
        self._make_trainer = make_trainer
        self._faults = faults
        self._trainer = make_trainer()

    def play_round(self) -> CommunicationRound:
        """Sample clients, ask them, hear them and aggregate."""
        going = self._server.sample()
        for client in going.clients:
            if self._ask(going, client) == "lost":
                self._ask(going, client)
        return self._server.aggregate()

    def _ask(self, going: CommunicationRound, client: int) -> Outcome:
        """Ask a client, and return what became of its answer."""
        payload = self._server.ask(client)
        try:
            reply = self._faults.reply(going.number, client, lambda: self._trainer.answer(client, payload))
        except ProcessLostError:
            self._trainer = self._make_trainer()
            return going.miss(client, "its process was lost")
        if reply is None:
            return going.miss(client, "no answer")
        if self._faults.is_late(reply):
            return going.miss(client, f"late by {reply.seconds:g} s")
        return self._server.hear(client, reply.data)
