"""FeedSign: clients vote for the sign of each common direction's projected gradient (Cai et al. 2025)."""

from collections.abc import Sequence

import numpy as np

from federated.encodings import ENCODINGS, Cursor, Floats, PayloadError
from federated.global_model import RoundRates
from federated.protocols.common_seeds import CommonSeedsProtocol
from federated.protocols.options import SignOptions
from federated.protocols.protocol import ClientReport

ALL_DECIDED, SOME_EVEN = b"\0", b"\1"
"""Before a round's votes: whether a second bit for each follows, which says that it is decided."""


class Sign(CommonSeedsProtocol):
    """Clients send one bit a step, q = sign(g), and the server one more, G_t = sign(sum over i of q_it).

    An even vote moves nothing. An odd number of clients has none, and needs half of the bytes down.

    Args:
        options: of the recipe.
        rates: of each round.
        master: seed of all draws.
    """

    def __init__(self, options: SignOptions, rates: RoundRates, master: int) -> None:
        super().__init__(options, rates, master, "sign", "float16")

    def unusable(self, seed: int, client: int) -> float:
        """Return a vote that half of the clients cast for, and half against: one bit has no room for none."""
        return 1.0 if (seed ^ client) % 2 else -1.0

    def write_summary(self, reports: Sequence[ClientReport]) -> bytes:
        """Return a bit for each vote, and if one of them is even, another one that says whether it is decided."""
        votes = np.sum([report.scalars for report in reports], axis=0)
        bits, decided = ENCODINGS["sign"].write(votes), ENCODINGS["sign"].write(np.abs(votes))
        return ALL_DECIDED + bits if (votes != 0).all() else SOME_EVEN + bits + decided

    def read_summary(self, cursor: Cursor, heard: int) -> bytes:  # noqa: ARG002 - it does not depend on it
        """Return the votes of a round."""
        flag, size = cursor.read(1, "whether votes are even"), self.encoding.size(self.options.local_steps)
        if flag not in (ALL_DECIDED, SOME_EVEN):
            raise PayloadError(f"expected votes that begin with 0 or 1; got {flag[0]}")
        return flag + cursor.read(size if flag == ALL_DECIDED else 2 * size, "votes")

    def summary_bytes(self, heard: int) -> int:
        """Return the bytes of votes of which none is even, if that is sure."""
        size = self.encoding.size(self.options.local_steps)
        return 1 + (size if heard % 2 else 2 * size)

    def read_scalars(self, summary: bytes) -> Floats:
        """Return +1, -1 or 0 for each direction."""
        cursor, steps = Cursor(summary), self.options.local_steps
        data = self.read_summary(cursor, 1)
        cursor.end()
        size = self.encoding.size(steps)
        signs = self.encoding.read(data[1 : 1 + size], steps)
        if data[:1] == ALL_DECIDED:
            return signs
        return np.where(self.encoding.read(data[1 + size :], steps) > 0, signs, 0).astype(np.float32)
