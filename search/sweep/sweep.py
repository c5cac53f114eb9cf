"""Sweeps: trials of a searcher, each trained as far as a pruner says."""

from collections.abc import Mapping
from typing import Any

from search.scheduling.scheduler import Problem, Scheduler, SearchError, summary_of
from search.scheduling.segments import Origin, Segment, SegmentReport, next_segment, report_to_plain
from search.scheduling.work import Failed
from search.searcher import Candidate, CandidateResult, Searcher
from search.space import guessed
from search.sweep.options import SweepOptions
from search.sweep.pruner import Pruner


class Sweep(Scheduler):
    """The engine of sweeps. Decisions depend on the order of arrivals, which `follow` repeats.

    Args:
        problem: what the search is about.
        options: the `[search]` section.
        searcher: proposes configurations.
        pruner: decides how far they are trained.
    """

    def __init__(self, problem: Problem, options: SweepOptions, searcher: Searcher, pruner: Pruner) -> None:
        super().__init__(problem, options.max_failures)
        self.options = options
        self._searcher = searcher
        self._pruner = pruner
        self._paused: dict[int, SegmentReport] = {}
        self._begun = 0
        self._last_failure = ""
        self._steps = 0
        self._exhausted = False

    def digests(self) -> set[str]:
        """Return the states that a later decision, or a resume, can need."""
        paused = self._paused.values()
        starts = {report.segment.origin.snapshot.digest for report in paused} - {""}
        return super().digests() | starts | {report.snapshot.digest for report in paused}

    def state_dict(self) -> dict[str, Any]:
        """Return all that decisions depend on, as plain data."""
        return {
            **super().state_dict(),
            "paused": [report_to_plain(report) for _, report in sorted(self._paused.items())],
            "begun": self._begun,
            "last_failure": self._last_failure,
            "steps": self._steps,
            "exhausted": self._exhausted,
            "searcher": self._searcher.state_dict(),
            "pruner": self._pruner.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of an earlier sweep; what was under way there is handed out again."""
        super().load_state_dict(state)
        paused = [self._read_report(plain) for plain in state["paused"]]
        self._paused = {report.member: report for report in paused}
        self._begun, self._steps = state["begun"], state["steps"]
        self._last_failure, self._exhausted = state["last_failure"], state["exhausted"]
        self._searcher.load_state_dict(state["searcher"])
        self._pruner.load_state_dict(state["pruner"])

    @property
    def _spent(self) -> bool:
        """Whether the budget of steps is used up."""
        return bool(self.options.total_steps) and self._steps >= self.options.total_steps

    def _fill(self, limit: int) -> None:
        while not self._spent and self._may_begin(limit):
            if not self._promote() and not self._begin_trial():
                break
        if self._last_failure and self.best is None and not self._segments:
            raise SearchError(f"all {self._begun} trials failed; the last one: {self._last_failure}")

    def _reported(self, report: SegmentReport) -> None:
        trial, step = report.member, report.snapshot.step
        self._steps += step - report.segment.origin.snapshot.step
        self._searcher.tell([CandidateResult(Candidate(trial, report.segment.configuration), report.fitness)])
        until = self._pruner.judge(trial, step, report.fitness, report.segment.configuration.changes)
        remark = self._pruner.remark()
        if until is not None and not self._spent:
            self._continue(report, until, action="continue", ended=report.segment.row, score=report.score, **remark)
            return
        promotable = self._pruner.promotable()
        action = "end" if step >= self.problem.steps else "pause" if trial in promotable else "stop"
        self._close(report, action, **remark)
        paused = {**self._paused, trial: report}
        self._paused = {other: paused[other] for other in paused if other in promotable}

    def _given_up(self, segment: Segment, failure: Failed) -> None:
        self._last_failure = f"trial {segment.member} ({failure.cause}): {failure.message}"
        self._searcher.tell([CandidateResult(Candidate(segment.member, segment.configuration), None)])
        self._note(action="fail", ended=segment.row, member=segment.member, failure=summary_of(failure))

    def _promote(self) -> bool:
        """Go on with a paused trial; return whether there was one."""
        promoted = self._pruner.promote()
        if promoted is None:
            return False
        trial, until = promoted
        self._continue(self._paused.pop(trial), until, action="promote")
        return True

    def _begin_trial(self) -> bool:
        """Begin a new trial; return whether there was one."""
        trial = self._begun
        if trial >= self.options.trials or self._exhausted:
            return False
        candidate = self._candidate(trial)
        if candidate is None:
            self._exhausted = True
            return False
        self._begun += 1
        until = self._pruner.first_step(trial)
        seed = self.problem.base_seed  # trials differ by their configurations alone
        segment = Segment(self._next_row, trial, 0, Origin(), None, until, candidate.configuration, seed)
        remark = {} if trial < len(self.options.first) else self._searcher.remark()
        self._open(segment, action="start", **remark)
        return True

    def _candidate(self, trial: int) -> Candidate | None:
        if trial < len(self.options.first):
            guess = self.options.first[trial]
            return Candidate(trial, guessed(self.problem.space, guess, self.problem.seed, trial))
        return next(iter(self._searcher.ask([trial])), None)

    def _continue(self, report: SegmentReport, until: int, **about: Any) -> None:
        segment = next_segment(report.segment, self._next_row, report, until, report.segment.configuration)
        self._open(segment, parent=report.member, **about)
