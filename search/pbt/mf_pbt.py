"""Multiple-frequencies population based training: slow sub-populations against greedy decisions."""

from typing import Annotated

import numpy as np
from pydantic import Field

from search.pbt.exploit import KEEP, Exploit
from search.pbt.population import Population, Selection
from search.scheduling.segments import SegmentReport


class MultipleFrequencies(Exploit):
    """Sub-populations decide at different frequencies, and good members migrate between them.

    A sub-population of frequency f decides every f intervals. The k-th of its worst quarter copies the k-th of its best
    quarter and explores. Its third quarter takes migrants, the best outsiders in order of rank, each where it is better
    than the member. A migrant from a slower sub-population brings weights and hyperparameters; one from a faster one
    brings weights, beside the hyperparameters of the best local member.

    Source: Doulazmi et al. 2025 (MF-PBT, arXiv 2506.03225), section 4: internal exploit, asymmetric migration.

    Attributes:
        frequencies: intervals between two decisions of each sub-population; members are split evenly, in order.
    """

    frequencies: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 10, 25, 50), min_length=1)

    def check(self, size: int) -> None:
        """Check that each sub-population has quarters."""
        parts = len(self.frequencies)
        if size % parts or size < 4 * parts:
            raise ValueError(
                f"expected a multiple of {parts}, at least {4 * parts}, for {parts} sub-populations; got {size}"
            )

    def select(self, own: SegmentReport, population: Population, rng: np.random.Generator) -> Selection:  # noqa: ARG002
        """Return the parent of the same rank, or a migrant."""
        size = population.size // len(self.frequencies)
        place = own.member // size
        if (population.generation + 1) % self.frequencies[place]:
            return KEEP
        best_first = population.ranked()[::-1]
        local = [report for report in best_first if report.member // size == place]
        rank, quarter = local.index(own), len(local) // 4
        statistic = {"subpopulation": place, "rank": rank}
        if rank >= len(local) - quarter:
            return Selection(local[rank - len(local) + quarter], statistic)
        outsiders = [report for report in best_first if report.member // size != place]
        migrant = _migrants(local[2 * quarter : 3 * quarter], outsiders).get(own.member)
        if migrant is None:
            return Selection(None, statistic, explore=False)
        there = self.frequencies[migrant.member // size]
        values_from = (
            own if there == self.frequencies[place] else migrant if there > self.frequencies[place] else local[0]
        )
        return Selection(migrant, statistic, explore=False, values_from=values_from)


def _migrants(bracket: list[SegmentReport], outsiders: list[SegmentReport]) -> dict[int, SegmentReport]:
    """Return member -> the outsider that takes its place; both lists have the best first."""
    migrants: dict[int, SegmentReport] = {}
    for report in bracket:
        if outsiders and report.rank < outsiders[0].rank:
            migrants[report.member] = outsiders.pop(0)
    return migrants
