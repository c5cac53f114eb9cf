"""The rounds of a run, over any channel: sample, ask, hear, aggregate, save."""

from collections.abc import Callable, Generator, Iterable
from pathlib import Path

from federated.channel import Channel, NoReport
from federated.round_log import RoundLog
from federated.server import CommunicationRound, Server

STATES, REPORTS = "states", "reports.bin"
"""In a run's folder: the server's states, and every report that was used."""


class Rounds:
    """Plays a server's rounds with clients that a channel reaches.

    Args:
        server: of the run.
        channel: to its clients.
    """

    def __init__(self, server: Server, channel: Channel) -> None:
        self._server = server
        self._channel = channel

    def run(
        self,
        folder: Path,
        record: Callable[[CommunicationRound], None] = lambda done: None,  # noqa: ARG005
    ) -> Generator[CommunicationRound]:
        """Play a run to its end, from what a folder holds of it, and yield each round when it is saved.

        The folder gets `states`, and `reports.bin`, from which `round_log.replay` repeats the run.

        Args:
            folder: of the run.
            record: called with each round before it is saved, and again for a round that was not saved in time.

        Raises:
            CheckpointError: the folder cannot be written to, or holds something damaged.
            RecipeError: it holds another run.
        """
        server = self._server
        server.resume(folder / STATES)
        folder.mkdir(parents=True, exist_ok=True)
        with RoundLog(folder / REPORTS, server.about(), server.protocol, server.model.version) as log:
            while not server.is_done():
                done = self.play_round()
                log.append(done.number, done.used)
                record(done)
                server.save(folder / STATES)
                yield done

    def play_round(self) -> CommunicationRound:
        """Sample clients, ask them, hear them and aggregate; who has not the model that it needs is asked twice."""
        going = self._server.sample()
        lost = self._ask(going, going.clients)
        for client in self._ask(going, lost):
            going.miss(client, "it cannot make the model of the whole of it")
        going.late = list(self._channel.late_answers())
        return self._server.aggregate()

    def _ask(self, going: CommunicationRound, clients: Iterable[int]) -> list[int]:
        """Ask clients, and return those that are lost."""
        payloads, lost = {client: self._server.ask(client) for client in clients}, []
        for client, answer in self._channel.ask(going.number, payloads):
            if isinstance(answer, NoReport):
                going.miss(client, answer.reason)
            elif self._server.hear(client, answer) == "lost":
                lost.append(client)
        return sorted(lost)
