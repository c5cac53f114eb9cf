"""The population, as exploit and explore rules see it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from search.chooser import Configuration
from search.scheduling.segments import SegmentReport
from search.space import Space


@dataclass(frozen=True, slots=True)
class Population:
    """What is known when a decision is made.

    Attributes:
        reports: the latest of each member that can be compared, by member.
        size: how many members there are.
        generation: how many decisions were made before for the member that is decided on.
        space: the hyperparameters.
        running: configurations that are being trained.
        level: fitness of the model that will be trained with the explored hyperparameters.
        observations: earlier reports, oldest first, as far as the explore rule wants them.
    """

    reports: tuple[SegmentReport, ...]
    size: int
    generation: int
    space: Space
    running: tuple[Configuration, ...] = ()
    level: float = 0.0
    observations: tuple[SegmentReport, ...] = ()

    def ranked(self) -> list[SegmentReport]:
        """Return the reports from the worst to the best; of equals, the higher member counts as better."""
        return sorted(self.reports, key=lambda report: report.rank)


@dataclass(frozen=True, slots=True)
class Selection:
    """What an exploit rule decides for a member.

    Attributes:
        donor: whom to inherit from; None: the member goes on as it is.
        statistic: what the decision was based on, for the lineage.
        explore: whether the inherited hyperparameters are explored.
        values_from: whose hyperparameters to take, where the rule decides this; None: as `inherit` says.
    """

    donor: SegmentReport | None
    statistic: Mapping[str, Any] = field(default_factory=dict)
    explore: bool = True
    values_from: SegmentReport | None = None
