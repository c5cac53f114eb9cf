"""A run in one process: every message is the bytes that would travel, and clients are served one after the other."""

from collections.abc import Callable, Iterator
from pathlib import Path

from federated.client import LocalTrainer
from federated.faults import ClientFaultPlan, ProcessLostError
from federated.round_log import RoundLog
from federated.server import CommunicationRound, Outcome, Server


class Simulation:
    """Plays rounds in this process.

    Args:
        server: of the run.
        make_trainer: returns a process's trainer, in place of one that was lost.
        faults: that happen.
    """

    def __init__(self, server: Server, make_trainer: Callable[[], LocalTrainer], faults: ClientFaultPlan) -> None:
        self._server = server
        self._make_trainer = make_trainer
        self._faults = faults
        self._trainer = make_trainer()

    def run(self, folder: Path) -> Iterator[CommunicationRound]:
        """Play a run to its end, from what a folder holds of it, and yield each round when it is saved.

        The folder gets `states`, and `reports.bin`, from which `round_log.replay` repeats the run.

        Raises:
            CheckpointError: the folder cannot be written to, or holds something damaged.
            RecipeError: it holds another run.
        """
        server, protocol = self._server, self._server.protocol
        server.resume(folder / "states")
        folder.mkdir(parents=True, exist_ok=True)
        with RoundLog(folder / "reports.bin", server.about(), protocol, server.model.version) as log:
            while server.model.version < len(protocol.rates.lr):
                done = self.play_round()
                log.append(done.number, done.used)
                server.save(folder / "states")
                yield done

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
