"""The server of a run: which clients are asked, what is heard of them, and the model that follows.

A round goes sampled -> asked -> heard -> aggregated -> saved, and only the last leaves something on the disk. So a
server that is killed in between asks the round again: clients and draws follow from its number, and no round counts
twice.
"""

import hashlib
import logging
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from federated.broadcast import ModelHistory
from federated.channel import LateAnswer
from federated.checkpoint import check_same_run, read_newest, write_checkpoint
from federated.encodings import PayloadError
from federated.global_model import GlobalModel
from federated.options import ReportLimits
from federated.protocols.protocol import ClientReport, Protocol
from federated.sampling import participants
from federated.wire import ReportHeader, check_report_seal, is_lost, read_report
from raytrain.errors import RecipeError

logger = logging.getLogger(__name__)

REFUSALS_KEPT = 20
"""Of a round, with their reasons; all are counted."""

ReportOutcome = Literal["heard", "lost", "refused", "missing"]


@dataclass(frozen=True, slots=True)
class Participation:
    """Who takes part.

    Attributes:
        clients: that are registered.
        per_round: of these, drawn for each round.
        quorum: that have to be heard, or the round moves nothing.
        partition: which examples each has, as the recipe says it.
    """

    clients: int
    per_round: int
    quorum: int = 1
    partition: str = ""


def check_same_origin(client: int, origin: str, expected: str) -> None:
    """Refuse a client that begins with something else than the server.

    Raises:
        RecipeError: its first weights, its adapter, what these stand beside, or its recipe is not the run's.
    """
    if origin != expected:
        raise RecipeError(
            f"client {client}: expected first weights, directions and options with digest {expected[:12]}; "
            f"got {origin[:12]!r}; it needs the server's recipe, and the same files of the model, also those that an "
            "adapter stands beside"
        )


@dataclass(slots=True)
class CommunicationRound:
    """A round that is going on.

    Attributes:
        number: counted from 0.
        clients: that take part, in ascending order.
        asked: of these, those that were sent the model.
        heard: client -> its report.
        missing: client -> why nothing of it was heard in time.
        used: the reports that were added up, in the order of clients; none without a quorum.
        refused: how many reports are not used.
        refusals: why, of the first ones.
        late: answers to earlier rounds that came during this one, and are not used.
        bytes_down: of all payloads.
        bytes_up: of all reports.
        payloads: how many were sent.
        reports: how many came, whatever became of them.
    """

    number: int
    clients: tuple[int, ...]
    asked: set[int] = field(default_factory=set)
    heard: dict[int, ClientReport] = field(default_factory=dict)
    missing: dict[int, str] = field(default_factory=dict)
    used: list[ClientReport] = field(default_factory=list)
    refused: int = 0
    refusals: list[str] = field(default_factory=list)
    late: list[LateAnswer] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0
    payloads: int = 0
    reports: int = 0

    def has(self, client: int) -> bool:
        """Return whether a client takes part."""
        index = bisect_left(self.clients, client)
        return index < len(self.clients) and self.clients[index] == client

    def refuse(self, client: int, reason: str) -> ReportOutcome:
        """Note that a client's report is not used."""
        self.refused += 1
        if len(self.refusals) < REFUSALS_KEPT:
            self.refusals.append(f"client {client}, round {self.number}: {reason}")
            logger.warning("%s; the report is not used", self.refusals[-1])
        return "refused"

    def miss(self, client: int, reason: str) -> ReportOutcome:
        """Note that nothing of a client was heard in time."""
        self.missing[client] = reason
        return "missing"


class Server:
    """The state of a run, and its transitions.

    Args:
        protocol: what is asked and added up.
        base: the digest of w0 and its directions.
        participation: who takes part; a client that is idle costs 4 bytes.
        limits: what a report may say.

    Attributes:
        protocol: the same.
        history: of the model.
        round: the one that is going on; None between rounds.
        versions: of the model that each client has, shape (clients,).
    """

    def __init__(
        self,
        protocol: Protocol,
        base: str,
        participation: Participation,
        limits: ReportLimits | None = None,
    ) -> None:
        self.protocol, self._participation = protocol, participation
        self._limits = limits or ReportLimits()
        self.history = ModelHistory(protocol, protocol.initial(base))
        self.versions: NDArray[np.uint32] = np.zeros(participation.clients, np.uint32)
        self.round: CommunicationRound | None = None

    @property
    def model(self) -> GlobalModel:
        """The newest model; its version is the number of rounds that are done."""
        return self.history.model

    def is_done(self) -> bool:
        """Return whether all rounds of the schedule are done."""
        return self.model.version == len(self.protocol.rates.lr)

    def check_origin(self, client: int, origin: str) -> None:
        """Refuse a client that begins with something else: it would add other directions to other weights.

        Raises:
            RecipeError: see `check_same_origin`.
        """
        check_same_origin(client, origin, self.model.origin)

    def sample(self) -> CommunicationRound:
        """Begin the next round, with clients that follow from its number."""
        number = self.model.version
        if self.is_done():
            raise RuntimeError(f"all {number} rounds are done")
        clients = participants(self.protocol.master, number, len(self.versions), self._participation.per_round)
        self.round = CommunicationRound(number, tuple(clients.tolist()))
        return self.round

    def ask(self, client: int) -> bytes:
        """Return the payload for a client of the round.

        Raises:
            ValueError: it takes no part.
        """
        going = self._going()
        if not going.has(client):
            raise ValueError(f"client: expected one of round {going.number}; got {client}")
        directions = self.protocol.directions(going.number, client) if self.protocol.sends_directions else None
        payload = self.history.payload(int(self.versions[client]), directions)
        going.asked.add(client)
        going.bytes_down += len(payload)
        going.payloads += 1
        return payload

    def hear(self, client: int, data: bytes) -> ReportOutcome:
        """Take a client's report, and return what became of it.

        Returns:
            "heard"; "lost": the client has not the model that it was thought to have: ask it again; "refused": it is
            not used, and the round says why.
        """
        going = self._going()
        going.bytes_up += len(data)
        going.reports += 1
        expected = ReportHeader(self.model.version, going.number, self.protocol.options.local_steps, examples=1)
        if client in going.asked and client not in going.heard and is_lost(data, expected, client):
            self.versions[client] = 0
            return "lost"
        try:
            going.heard[client] = self._report(going, client, data, expected)
        except PayloadError as error:
            return going.refuse(client, str(error))
        return "heard"

    def aggregate(self) -> CommunicationRound:
        """Add the reports up, in the order of clients and not of arrival, and end the round.

        Without a quorum the model stays as it is, and the round is over all the same.
        """
        going, self.round = self._going(), None
        enough = len(going.heard) >= self._participation.quorum
        going.used = [going.heard[client] for client in sorted(going.heard)] if enough else []
        self.versions[sorted(going.heard)] = self.model.version
        self.history.advance(self.protocol.summarise(going.used))
        self.protocol.observe(going.used)
        return going

    def save(self, folder: Path) -> None:
        """Write the state between rounds: complete or not at all, the two newest being kept.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.round is not None:
            raise RuntimeError("a round is going on; call aggregate() first")
        state = {**self.history.state(), "versions": self.versions}
        state |= {f"protocol.{name}": value for name, value in self.protocol.state().items()}
        write_checkpoint(folder, self.model.version, self.about(), state)

    def resume(self, folder: Path) -> bool:
        """Take back the newest state in a folder, and return whether there is one.

        Raises:
            CheckpointError: there are only damaged ones.
            RecipeError: it is of another run.
        """
        found = read_newest(folder)
        if found is None:
            return False
        about, state = found
        check_same_run(folder, self.about(), about)
        self.round, self.versions = None, state.pop("versions")
        prefix = "protocol."
        self.protocol.load_state({k.removeprefix(prefix): state.pop(k) for k in list(state) if k.startswith(prefix)})
        self.history.load_state(state)
        return True

    def about(self) -> dict[str, str]:
        """Return what a run is known by: with another of these its draws or its model mean something else."""
        return {
            "seed": str(self.protocol.master),
            "participation": repr(self._participation),
            "protocol": self.protocol.options.model_dump_json(),
            "rates": hashlib.sha256(self.protocol.rates.lr.tobytes()).hexdigest(),
            "origin": self.model.origin,
        }

    def _going(self) -> CommunicationRound:
        if self.round is None:
            raise RuntimeError("no round is going on; call sample() first")
        return self.round

    def _report(self, going: CommunicationRound, client: int, data: bytes, expected: ReportHeader) -> ClientReport:
        if client not in going.asked:
            raise PayloadError("expected a client that was asked; this one was not")
        if client in going.heard:
            raise PayloadError("expected one report; got another one")
        examples, scalars = read_report(data, expected, self._limits.examples, self.protocol.encoding)
        check_report_seal(data, client, self.model.digest)
        finite = scalars[~np.isnan(scalars)]
        if len(finite) and np.abs(finite).max() > self._limits.largest:
            raise PayloadError(f"expected numbers up to {self._limits.largest:g}; got {np.abs(finite).max():g}")
        return ClientReport(client, examples, scalars, self.protocol.directions(going.number, client))
