"""FedKSeed: clients take local zeroth-order steps along a pool of K seeds (Qin et al. 2024, ICML)."""

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from federated.encodings import Cursor
from federated.global_model import RoundRates
from federated.protocols.options import PoolOptions
from federated.protocols.protocol import ClientReport, Protocol, client_weights, nan_as_zero
from federated.sampling import Indices, SeedPool, pool_directions

SUMMARY_ENTRY = struct.Struct("<II")
"""Of a client in a summary: its number and its examples."""


class FedKSeed(Protocol):
    """Local steps w <- w - lr q z(k) along drawn seeds of a pool; the server adds the q of each seed up.

    G_k = sum over clients i and steps t that drew k of c_i q_it. The learning rate is in the coefficients, so it may
    have a schedule, which the published sum of q alone forbids.

    Args:
        options: of the recipe.
        rates: of each round.
        master: seed of all draws.
    """

    def __init__(self, options: PoolOptions, rates: RoundRates, master: int) -> None:
        table = SeedPool(master, options.pool)
        super().__init__(options, rates, master, table, up=options.up, down=options.down)
        self.pool = options.pool

    def directions(self, round_number: int, client: int) -> Indices:
        """Draw uniformly; both sides can, so no indices are sent."""
        return pool_directions(self.master, round_number, client, self.options.local_steps, self.pool)

    def write_summary(self, reports: Sequence[ClientReport]) -> bytes:
        """Return all reports: number and examples of each client, and its numbers."""
        return b"".join(
            SUMMARY_ENTRY.pack(report.client, report.examples) + self._write_entry(report) for report in reports
        )

    def read_summary(self, cursor: Cursor, heard: int) -> bytes:
        """Return all reports of a round."""
        return cursor.read(self.summary_bytes(heard), "reports")

    def summary_bytes(self, heard: int) -> int:
        """Return the bytes of all reports."""
        return heard * self._entry_size()

    def pseudo_gradient(self, round_number: int, heard: int, summary: bytes) -> tuple[Indices, NDArray[np.float64]]:
        """Return each report's numbers times its client's weight, one report after the other."""
        cursor = Cursor(summary)
        reports = [self._read_report(cursor, round_number) for _ in range(heard)]
        cursor.end()
        weights = client_weights(reports, self.options.weighting)
        gradients = [weight * nan_as_zero(report.scalars) for weight, report in zip(weights, reports, strict=True)]
        return np.concatenate([report.directions for report in reports]), np.concatenate(gradients)

    def _read_report(self, cursor: Cursor, round_number: int) -> ClientReport:
        client, examples = SUMMARY_ENTRY.unpack(cursor.read(SUMMARY_ENTRY.size, "a client"))
        directions, scalars = self._read_entry(cursor, round_number, client)
        return ClientReport(client, examples, self.encoding.read(scalars, self.options.local_steps), directions)

    def _entry_size(self) -> int:
        return SUMMARY_ENTRY.size + self.encoding.size(self.options.local_steps)

    def _write_entry(self, report: ClientReport) -> bytes:
        return self.encoding.write(report.scalars)

    def _read_entry(self, cursor: Cursor, round_number: int, client: int) -> tuple[Indices, bytes]:
        scalars = cursor.read(self.encoding.size(self.options.local_steps), "scalars")
        return self.directions(round_number, client), scalars
