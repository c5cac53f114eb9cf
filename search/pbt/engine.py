"""Population based training: train all members for an interval, then exploit and explore.

    while step < steps:
        theta, step <- train(theta | h) for an interval;  score <- evaluate(theta)
        donor <- exploit(member, population)
        if donor: theta, h <- those of the donor;  h <- explore(h)

Source: Jaderberg et al. 2017, Population Based Training of Neural Networks (arXiv 1711.09846), algorithm 1.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from search.chooser import Configuration, replaying, sampling
from search.pbt.exploit import KEEP
from search.pbt.options import PBTOptions
from search.pbt.population import Population, Selection
from search.rng import keyed_generator, keyed_seed
from search.scheduling.scheduler import Problem, Scheduler, SearchError, summary_of
from search.scheduling.segments import (
    Origin,
    Segment,
    SegmentReport,
    next_segment,
    report_to_plain,
    segment_from_plain,
    segment_to_plain,
)
from search.scheduling.work import Failed

logger = logging.getLogger(__name__)

DONORS = 0.25
"""Share of the population that a failed member is replaced from."""

SLOW = Failed("", "slow", "it had not reported when the quorum had waited for search.timeout_seconds")


class PopulationBasedTraining(Scheduler):
    """The engine of population based training.

    Synchronous: decisions are made once all members have reported or failed, in the order of the members, so the order
    of arrivals does not matter. Asynchronous: a decision is made when its member reports, from the latest reports of
    the others; `follow` repeats a logged order of arrivals.

    Args:
        problem: what the search is about.
        options: the `[search]` section.
    """

    def __init__(self, problem: Problem, options: PBTOptions) -> None:
        super().__init__(problem, options.max_failures)
        self.options = options
        self._reports: list[SegmentReport] = []
        self._failures: dict[int, tuple[Segment, Failed]] = {}
        self._active = set(range(options.population))
        self._failed_in_a_row: dict[int, int] = {}
        self._observations: list[SegmentReport] = []
        self._trapped: set[str] = set()

    def expire(self) -> bool:
        """Give up the members that have not reported, if a quorum has; return whether there were any."""
        missing = self._missing()
        quorum = self.options.quorum * len(self._active)
        if not self.options.synchronous or not missing or len(self._reports) < quorum:
            return False
        for segment in [segment for segment in self._segments.values() if segment.member in missing]:
            self._queue.withdraw([segment.row])
            self._count_failure(self._segments.pop(segment.row), SLOW)
        self._decide_all()
        return True

    def retire(self, member: int, why: str) -> None:
        """Go on without a member that whoever trains it has ended.

        Args:
            member: one that has not reported in this generation.
            why: for the lineage.
        """
        for segment in [segment for segment in self._segments.values() if segment.member == member]:
            self._queue.withdraw([segment.row])
            self._note(action="retire", ended=self._segments.pop(segment.row).row, member=member, why=why)
        self._active.discard(member)
        if self.options.synchronous and self._reports and not self._missing():
            self._decide_all()

    def digests(self) -> set[str]:
        """Return the states that a later decision, or a resume, can need."""
        ends = {report.snapshot.digest for report in self._reports}
        starts = {report.segment.origin.snapshot.digest for report in self._reports}
        return super().digests() | ((ends | starts) - {""})

    def state_dict(self) -> dict[str, Any]:
        """Return all that decisions depend on, as plain data."""
        failures = [
            [segment_to_plain(segment), asdict(failure)] for _, (segment, failure) in sorted(self._failures.items())
        ]
        order = sorted(self._reports, key=lambda report: report.segment.row)
        return {
            **super().state_dict(),
            "reports": [report_to_plain(report) for report in order],
            "failures": failures,
            "active": sorted(self._active),
            "failed_in_a_row": sorted(self._failed_in_a_row.items()),
            "observations": [report_to_plain(report) for report in self._observations],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of an earlier engine; what was under way there is handed out again."""
        super().load_state_dict(state)
        self._reports = [self._read_report(plain) for plain in state["reports"]]
        failures = [(segment_from_plain(plain, self.problem.space), Failed(**why)) for plain, why in state["failures"]]
        self._failures = {segment.member: (segment, failure) for segment, failure in failures}
        self._active = set(state["active"])
        self._failed_in_a_row = dict(state["failed_in_a_row"])
        self._observations = [self._read_report(plain) for plain in state["observations"]]

    def _fill(self, limit: int) -> None:  # noqa: ARG002 - a population is whole from the beginning
        if self._next_row == 0:
            for member in sorted(self._active):
                self._start(member, generation=0)

    def _reported(self, report: SegmentReport) -> None:
        self._failed_in_a_row.pop(report.member, None)
        self._reports.append(report)
        if not self.options.synchronous:
            self._observe([report])
            self._decide(report, self._reports)
            self._forget()
        elif not self._missing():
            self._decide_all()

    def _given_up(self, segment: Segment, failure: Failed) -> None:
        self._count_failure(segment, failure)
        if not self.options.synchronous:
            self._replace(*self._failures.pop(segment.member), self._reports)
        elif not self._missing():
            self._decide_all()

    def _missing(self) -> set[int]:
        """Return the members that neither reported nor failed in this generation."""
        return self._active - {report.member for report in self._reports} - self._failures.keys()

    def _count_failure(self, segment: Segment, failure: Failed) -> None:
        self._failures[segment.member] = (segment, failure)
        self._failed_in_a_row[segment.member] = self._failed_in_a_row.get(segment.member, 0) + 1
        if self.best is None and self._active <= self._failed_in_a_row.keys():
            raise SearchError(_all_failed(len(self._active), segment, failure))

    def _decide_all(self) -> None:
        """Decide for all members of a generation."""
        reports, failures = sorted(self._reports, key=lambda report: report.member), self._failures
        if not reports:
            raise SearchError(_all_failed(len(self._active), *failures[max(failures)]))
        self._reports, self._failures = [], {}
        self._observe(reports)
        own = {report.member: report for report in reports}
        for member in sorted(self._active):
            if member in own:
                self._decide(own[member], reports)
            else:
                self._replace(*failures[member], reports)

    def _decide(self, own: SegmentReport, reports: Sequence[SegmentReport]) -> None:
        """Begin the next segment of a member that has reported, or end it."""
        if own.snapshot.step >= self.problem.steps or self._is_last(own.segment):
            self._close(own, "end")
            self._active.discard(own.member)
            return
        population = self._population(own.segment, self._comparable(own, reports))
        selection = self._select(own, population)
        state_from, values_from = self._inherit(own, selection)
        configuration = values_from.segment.configuration
        if selection.explore:
            configuration = self._explore(own.segment, values_from, state_from, population)
        old, new = own.segment.configuration.changes, configuration.changes
        self._continue(
            own.segment,
            state_from,
            configuration,
            action="exploit" if selection.donor else "continue" if old == new else "explore",
            values_from=values_from.member,
            score=own.score,
            parent_score=state_from.score,
            statistic=dict(selection.statistic),
        )

    def _replace(self, segment: Segment, failure: Failed, reports: Sequence[SegmentReport]) -> None:
        """Begin the next segment of a member that has failed, as a clone of a good one."""
        donors = self._population(segment, self._latest(reports))
        hopeless = self._failed_in_a_row[segment.member] > max(1, self.options.max_failures)
        if hopeless or self._is_last(segment) or (reports and not donors.reports):
            self._note(action="retire", ended=segment.row, member=segment.member, failure=summary_of(failure))
            self._active.discard(segment.member)
            return
        if not donors.reports:
            self._start(segment.member, segment.generation + 1, ended=segment.row, failure=summary_of(failure))
            return
        best = donors.ranked()[-max(1, int(DONORS * len(donors.reports))) :]
        donor = best[self._rng("replace", segment).integers(len(best))]
        configuration = self._explore(segment, donor, donor, donors)
        self._continue(segment, donor, configuration, action="replace", failure=summary_of(failure))

    def _start(self, member: int, generation: int, **why: Any) -> None:
        """Begin a segment with new weights and drawn hyperparameters."""
        guess = self.options.first[member] if generation == 0 and member < len(self.options.first) else {}
        rng = keyed_generator(self.problem.seed, "start", generation, member)
        configuration = self.problem.space.run(replaying(guess, sampling(rng)))
        seed = keyed_seed(self.problem.seed, "data", member)  # members see the data in orders of their own
        segment = Segment(self._next_row, member, generation, Origin(), None, self._until(0), configuration, seed)
        self._open(segment, action="start", **why)

    def _continue(
        self, before: Segment, source: SegmentReport, configuration: Configuration, action: str, **why: Any
    ) -> None:
        """Begin the next segment of a member from the state at the end of another one, or of its own last one."""
        segment = next_segment(before, self._next_row, source, self._until(source.snapshot.step), configuration)
        if source.member != before.member and self.options.optimizer_state == "reset":
            segment = replace(segment, reset_optimizer=True)
        old = dict(before.configuration.changes)
        self._open(segment, action=action, ended=before.row, parent=source.member, old=old, **why)

    def _select(self, own: SegmentReport, population: Population) -> Selection:
        quorum = self.options.quorum * len(self._active)
        few = not self.options.synchronous and len(population.reports) < quorum
        if few or own.snapshot.step < self.options.burn_in:
            return KEEP
        return self.options.exploit.select(own, population, self._rng("exploit", own.segment))

    def _inherit(self, own: SegmentReport, selection: Selection) -> tuple[SegmentReport, SegmentReport]:
        """Return whose weights and whose hyperparameters a member goes on with."""
        if selection.donor is None:
            return own, own
        if selection.values_from is not None:
            return selection.donor, selection.values_from
        inherit = self.options.inherit
        return (
            own if inherit == "hyperparameters" else selection.donor,
            own if inherit == "weights" else selection.donor,
        )

    def _explore(
        self, segment: Segment, values_from: SegmentReport, state_from: SegmentReport, population: Population
    ) -> Configuration:
        explore = self.options.explore
        for decision in values_from.segment.configuration.genome.decisions if explore.multiplies else ():
            if decision.domain.traps(decision.value) and decision.path not in self._trapped:
                self._trapped.add(decision.path)
                logger.warning(
                    "%s is 0 in member %d, and no factor leads away from 0; give the dimension a step, which is added, "
                    "or set search.explore = 'resample'",
                    decision.path,
                    values_from.member,
                )
        population = replace(population, level=state_from.fitness)
        return explore.propose(values_from, population, self._rng("explore", segment))

    def _population(self, segment: Segment, reports: Sequence[SegmentReport]) -> Population:
        others = (other for _, other in sorted(self._segments.items()) if other.member != segment.member)
        return Population(
            reports=tuple(sorted(reports, key=lambda report: report.member)),
            size=self.options.population,
            generation=segment.generation,
            space=self.problem.space,
            running=tuple(other.configuration for other in others),
            observations=tuple(self._observations),
        )

    def _comparable(self, own: SegmentReport, reports: Sequence[SegmentReport]) -> list[SegmentReport]:
        """Return the reports that a member's own one is compared with."""
        if self.options.step_matched:
            reports = [report for report in reports if report.snapshot.step == own.snapshot.step]
        return self._latest(reports)

    def _latest(self, reports: Sequence[SegmentReport]) -> list[SegmentReport]:
        """Return the last report of each member, of those that can still be next_segment."""
        return list({report.member: report for report in reports if report.snapshot.step < self.problem.steps}.values())

    def _forget(self) -> None:
        """Drop the reports that no later decision compares with."""
        latest = self._latest(self._reports)
        if self.options.step_matched:
            slowest = min((segment.until for segment in self._segments.values()), default=self.problem.steps)
            latest = [report for report in self._reports if report in latest or report.snapshot.step >= slowest]
        self._reports = latest if self._active else []

    def _observe(self, reports: Sequence[SegmentReport]) -> None:
        memory = self.options.explore.memory
        self._observations = [*self._observations, *reports][-memory:] if memory else []

    def _is_last(self, segment: Segment) -> bool:
        """Return whether a member has had as many segments as a whole training is.

        An asynchronous member can inherit from a donor that is behind it, and trains no longer for that.
        """
        return (segment.generation + 1) * self.options.interval >= self.problem.steps

    def _until(self, step: int) -> int:
        return min(step + self.options.interval, self.problem.steps)

    def _rng(self, purpose: str, segment: Segment) -> np.random.Generator:
        return keyed_generator(self.problem.seed, purpose, segment.generation, segment.member)


def pbt(problem: Problem, options: PBTOptions) -> PopulationBasedTraining:
    """Population based training: hyperparameters change while the members train."""
    return PopulationBasedTraining(problem, options)


def _all_failed(members: int, segment: Segment, failure: Failed) -> str:
    return f"all {members} members failed; member {segment.member} at last ({failure.cause}): {failure.message}"
