"""Common seeds: all clients of a round probe the same directions (Li et al. 2025, ICLR, DeComFL)."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from federated.encodings import ENCODINGS, Cursor, Floats
from federated.global_model import RoundRates
from federated.protocols.options import CommonOptions, CommonSeedsOptions
from federated.protocols.protocol import (
    ClientReport,
    Protocol,
    client_weights,
    nan_as_zero,
)
from federated.sampling import Indices, NewSeeds, SeedPool, common_seeds


class CommonSeedsProtocol(Protocol):
    """What protocols with common seeds share: a round's summary is one number for each of its directions.

    Args:
        options: of the recipe.
        rates: of each round.
        master: seed of all draws.
        up: how a client's numbers are written.
        down: how a pool's coefficients are written.
    """

    options: CommonOptions

    def __init__(self, options: CommonOptions, rates: RoundRates, master: int, up: str, down: str) -> None:
        table = SeedPool(master, options.pool) if options.pool else NewSeeds(master, options.local_steps)
        super().__init__(options, rates, master, table, up=up, down=down)
        self.local = options.local
        self._steps = np.arange(options.local_steps)

    def directions(self, round_number: int, client: int) -> Indices:  # noqa: ARG002 - all have the same
        """Return the round's directions, which do not depend on the client."""
        if not self.options.pool:
            return round_number * self.options.local_steps + self._steps
        drawn = common_seeds(self.master, round_number, self._steps)
        return (drawn % np.uint64(self.options.pool)).astype(np.int64)

    def pseudo_gradient(self, round_number: int, heard: int, summary: bytes) -> tuple[Indices, NDArray[np.float64]]:  # noqa: ARG002
        """Return the summary's numbers; without local moves each is the share of one direction in their mean."""
        gradient = nan_as_zero(self.read_scalars(summary))
        return self.directions(round_number, 0), gradient if self.local else gradient / self.options.local_steps

    @abstractmethod
    def read_scalars(self, summary: bytes) -> Floats:
        """Return the numbers of a summary, shape (steps,).

        Raises:
            PayloadError: the summary is malformed.
        """


class CommonSeeds(CommonSeedsProtocol):
    """The server sends the mean of the clients' projected gradients, G_t = sum over i of c_i q_it.

    Args:
        options: of the recipe.
        rates: of each round.
        master: seed of all draws.
    """

    def __init__(self, options: CommonSeedsOptions, rates: RoundRates, master: int) -> None:
        super().__init__(options, rates, master, options.up, "float32" if options.down == "float32" else "float16")
        self._mean = ENCODINGS[options.down]

    def write_summary(self, reports: Sequence[ClientReport]) -> bytes:
        """Return the mean, rounded once for all."""
        mean = np.zeros(self.options.local_steps)
        for weight, report in zip(client_weights(reports, self.options.weighting), reports, strict=True):
            mean += weight * nan_as_zero(report.scalars)
        return self._mean.write(mean)

    def read_summary(self, cursor: Cursor, heard: int) -> bytes:  # noqa: ARG002 - it does not depend on it
        """Return the mean."""
        return cursor.read(self.summary_bytes(1), "a mean")

    def summary_bytes(self, heard: int) -> int:  # noqa: ARG002
        """Return the bytes of the mean."""
        return self._mean.size(self.options.local_steps)

    def read_scalars(self, summary: bytes) -> Floats:
        """Return the mean."""
        cursor = Cursor(summary)
        data = self.read_summary(cursor, 1)
        cursor.end()
        return self._mean.read(data, self.options.local_steps)
