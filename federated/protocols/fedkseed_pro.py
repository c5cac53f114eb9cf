"""FedKSeed-Pro: directions with large projected gradients are drawn more often (Qin et al. 2024, section 4)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from federated.encodings import Cursor, read_indices, write_indices
from federated.global_model import RoundRates
from federated.protocols.fedkseed import FedKSeed
from federated.protocols.options import PoolOptions
from federated.protocols.protocol import ClientReport
from federated.sampling import Indices, important_directions

LARGEST = 1000.0
"""A projected gradient counts no more than this."""


class FedKSeedPro(FedKSeed):
    """FedKSeed whose server draws each client's directions, by the importance of seeds.

    m_k = the mean of min(|q|, 1000) over all reports of seed k and one initial 0,
    p = softmax((m - min m) / (max m - min m + 1e-10)): the likeliest seed is e times as likely as the unlikeliest.
    The server alone knows p, of 4 K bytes, so it draws, and sends each client its 2 bytes a step.
    """

    sends_directions = True

    def __init__(self, options: PoolOptions, rates: RoundRates, master: int) -> None:
        super().__init__(options, rates, master)
        self._totals = np.zeros(self.pool)
        self._counts = np.ones(self.pool)

    def directions(self, round_number: int, client: int) -> Indices:
        """Draw by importance, on the server."""
        return important_directions(self.master, round_number, client, self.options.local_steps, self.probabilities())

    def probabilities(self) -> NDArray[np.float64]:
        """Return how likely each seed of the pool is to be drawn, shape (K,)."""
        mean = self._totals / self._counts
        scaled = np.exp((mean - mean.min()) / (mean.max() - mean.min() + 1e-10))
        likely: NDArray[np.float64] = scaled / scaled.sum()
        return likely

    def observe(self, reports: Sequence[ClientReport]) -> None:
        """Add a round's projected gradients to the means of their seeds."""
        for report in reports:
            heard = ~np.isnan(report.scalars)
            np.add.at(self._totals, report.directions[heard], np.abs(report.scalars[heard]).clip(max=LARGEST))
            np.add.at(self._counts, report.directions[heard], 1)

    def state(self) -> dict[str, NDArray[np.float64]]:
        """Return the sums and counts behind the means."""
        return {"totals": self._totals, "counts": self._counts}

    def load_state(self, state: dict[str, NDArray[np.float64]]) -> None:
        """Take back what `state` returned."""
        self._totals, self._counts = state["totals"].copy(), state["counts"].copy()

    def _entry_size(self) -> int:
        return super()._entry_size() + 2 * self.options.local_steps

    def _write_entry(self, report: ClientReport) -> bytes:
        return write_indices(report.directions) + super()._write_entry(report)

    def _read_entry(self, cursor: Cursor, round_number: int, client: int) -> tuple[Indices, bytes]:  # noqa: ARG002
        indices = read_indices(cursor, self.options.local_steps, self.pool)
        return indices, cursor.read(self.encoding.size(self.options.local_steps), "scalars")
