"""The interface of protocols: zeroth-order methods whose messages are seeds that nobody sends, and numbers.

All of them keep one model, w0 + sum over k of a_k z(s_k), and advance it by one rule. In round r, with learning rate
lr_r and weight decay d towards w0,

    a <- (1 - lr_r d) a,    a_k <- a_k - lr_r G_k,    rounded to what clients can be sent,

where G is the round's pseudo-gradient: for each direction k the reports of the clients heard, added up in the order of
clients. What G follows from is the round's summary. Server and clients advance by the same function of the same bytes,
so a client that is sent summaries ends with the same coefficients, to the bit, as one that is sent the model.

The factor of all decays is a number that follows from the schedule. So it is kept apart, and a round changes only the
coefficients of directions that were reported: `GlobalModel.coefficients` are a over that factor.
"""

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from federated.encodings import COEFFICIENT_ENCODINGS, ENCODINGS, Coefficients, Cursor, Encoding, Floats
from federated.global_model import GlobalModel, RoundRates
from federated.protocols.options import ProtocolOptions
from federated.sampling import Indices, NewSeeds, SeedPool, Seeds

HEARD = struct.Struct("<H")
"""Before a round's summary: how many clients were heard."""


@dataclass(frozen=True, slots=True)
class ClientReport:
    """What the server heard of a client in a round.

    Attributes:
        client: its number.
        examples: that it has.
        scalars: the projected gradient along each of its directions, shape (steps,); nan: not used.
        directions: which ones, by their indices in the model, shape (steps,).
    """

    client: int
    examples: int
    scalars: Floats
    directions: Indices


class Protocol(ABC):
    """A federated zeroth-order method.

    Args:
        options: of the recipe.
        rates: of each round.
        master: seed of all draws.
        table: the seeds that directions stand for.
        up: how a client's numbers are written.
        down: how a model's coefficients are written.

    Attributes:
        local: whether a client moves along each direction before it probes the next one.
        encoding: of a client's numbers.
        sends_directions: whether the server tells each client which directions to probe.
    """

    local = True
    sends_directions = False

    def __init__(
        self,
        options: ProtocolOptions,
        rates: RoundRates,
        master: int,
        table: SeedPool | NewSeeds,
        *,
        up: str,
        down: str,
    ) -> None:
        self.options = options
        self.rates = rates
        self.master = master
        self.table = table
        self.encoding: Encoding = ENCODINGS[up]
        self.coefficients = COEFFICIENT_ENCODINGS[down]

    @abstractmethod
    def directions(self, round_number: int, client: int) -> Indices:
        """Return the indices of the directions that a client probes in a round, in order, shape (steps,)."""

    @abstractmethod
    def write_summary(self, reports: Sequence[ClientReport]) -> bytes:
        """Return what the pseudo-gradient of one or more reports follows from."""

    @abstractmethod
    def read_summary(self, cursor: Cursor, heard: int) -> bytes:
        """Return what `write_summary` returned for so many clients.

        Raises:
            PayloadError: there is less.
        """

    @abstractmethod
    def summary_bytes(self, heard: int) -> int:
        """Return the length of what `write_summary` returns for so many clients; the shortest, where it depends."""

    @abstractmethod
    def pseudo_gradient(self, round_number: int, heard: int, summary: bytes) -> tuple[Indices, NDArray[np.float64]]:
        """Return indices of directions, in the order in which they are added up, and what to add to each.

        Raises:
            PayloadError: the summary is malformed.
        """

    def observe(self, reports: Sequence[ClientReport]) -> None:  # noqa: B027 - most learn nothing
        """Learn from a round's reports what the server alone knows."""

    def state(self) -> dict[str, NDArray[np.float64]]:
        """Return what `observe` has learned."""
        return {}

    def load_state(self, state: dict[str, NDArray[np.float64]]) -> None:  # noqa: B027 - as little as they learn
        """Take back what `state` returned."""

    def unusable(self, seed: int, client: int) -> float:  # noqa: ARG002 - a vote depends on them
        """Return what a client reports along a direction whose projected gradient it does not use."""
        return np.nan

    def rate(self, round_number: int) -> float:
        """Return how far a client moves along a direction for each unit of its projected gradient."""
        return float(self.rates.lr[round_number])

    def initial(self, base: str) -> GlobalModel:
        """Return w0.

        Args:
            base: the digest of w0 and of what directions are. A client that begins with other weights, draws from
                another seed or has other options has another origin, and its reports are refused.
        """
        options = self.options.model_dump_json(exclude={"form"})  # of which all make the same model
        about = f"{base} {self.master} {options} ".encode()
        origin = hashlib.sha256(about + self.rates.lr.tobytes()).hexdigest()
        return GlobalModel(origin, np.zeros(self.table.size(0)))

    def summarise(self, reports: Sequence[ClientReport]) -> bytes:
        """Return a round's summary: how many clients were heard, and what its pseudo-gradient follows from.

        Args:
            reports: in the order of clients, in which they are added up.
        """
        return HEARD.pack(len(reports)) + (self.write_summary(reports) if reports else b"")

    def next_summary(self, cursor: Cursor) -> bytes:
        """Return the next round's summary of a payload.

        Raises:
            PayloadError: there is less than one.
        """
        head = cursor.read(HEARD.size, "a count of clients")
        (heard,) = HEARD.unpack(head)
        return head + (self.read_summary(cursor, heard) if heard else b"")

    def advance(self, model: GlobalModel, summary: bytes) -> GlobalModel:
        """Return the model after one more round.

        Raises:
            PayloadError: the summary is malformed.
        """
        coefficients = np.zeros(self.table.size(model.version + 1))
        coefficients[: len(model.coefficients)] = model.coefficients
        (heard,) = HEARD.unpack_from(summary)
        if heard:
            indices, gradient = self.pseudo_gradient(model.version, heard, summary[HEARD.size :])
            rate = self.rates.lr[model.version] / self.rates.shrinkage[model.version + 1]
            np.add.at(coefficients, indices, -rate * gradient)
        if not self.table.grows:  # else its summaries are all that is ever sent
            coefficients = self.coefficients.rounded(coefficients)
        return GlobalModel(model.origin, coefficients, model.version + 1)

    def seeds_and_coefficients(self, model: GlobalModel) -> tuple[Seeds, Coefficients]:
        """Return the directions of a model that are not 0, and how far it is from w0 along each."""
        (indices,) = np.nonzero(model.coefficients)
        return self.table.seeds(indices), model.coefficients[indices] * self.rates.shrinkage[model.version]


def client_weights(reports: Sequence[ClientReport], weighting: str) -> list[float]:
    """Return the weight of each client among those heard; they add up to 1."""
    counts = [report.examples if weighting == "examples" else 1 for report in reports]
    total = sum(counts)
    return [count / total for count in counts]


def nan_as_zero(scalars: Floats) -> NDArray[np.float64]:
    """Return scalars in float64; those that are not used are 0."""
    return np.nan_to_num(scalars.astype(np.float64), nan=0.0)
