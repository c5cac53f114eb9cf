"""Population based training for anybody's Ray Tune program, where Ray's own scheduler stood."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from raytrain.errors import RecipeError
from raytrain.overrides import apply_overrides
from raytrain.recipe import dotted_fields
from search.checks import check_guesses
from search.journal.lineage import Chain, Lineage
from search.pbt.engine import PopulationBasedTraining
from search.pbt.options import PBTOptions
from search.scheduling.scheduler import Problem
from search.scheduling.segments import Objective
from search.scheduling.work import Done, Snapshot, Work
from search.space import make_space

NO_END = 2**40
"""Steps of a whole training, where Tune decides when a trial ends."""


@dataclass(slots=True)
class Member:
    """A trial as a member of the population.

    Attributes:
        number: of the member.
        trial: Tune's.
        work: the interval that it trains; None: it has come to its end and waits for the others.
    """

    number: int
    trial: Trial
    work: Work | None = None

    @property
    def waits(self) -> bool:
        """Whether the trial is neither running nor saving, so that it can go on from another state."""
        return self.trial.status in (Trial.PENDING, Trial.PAUSED) and not self.trial.is_saving


class PBTScheduler(TrialScheduler):
    """Synchronous population based training, for `TuneConfig(scheduler=...)`.

    Trials pause every `interval`. When all have, the worst continue from checkpoints of better ones with other
    hyperparameters. Values that a trial's `param_space` has for a dimension are what it begins with.

    Args:
        space: dimensions by dotted name, as in `[search.space]` of a recipe, or "module:attribute" of a function.
        interval: of `time_attr`, between two decisions; a checkpoint has to be reported there.
        time_attr: the field of a result that counts.
        metric: to improve; None: that of `TuneConfig`.
        mode: "min" or "max"; None: that of `TuneConfig`.
        seed: of all decisions.
        lineage: a file for the decisions, a line of JSON each.
        **options: more of the `[search]` section: exploit, explore, inherit, burn_in.

    >>> table = {"layers": {"type": "int", "low": 1, "high": 4}, "lr": {"type": "float", "low": 1e-4, "high": 0.1}}
    >>> scheduler = PBTScheduler(table, interval=5, seed=1)
    """

    _supports_buffered_results = False

    def __init__(
        self,
        space: str | Mapping[str, Any],
        interval: int,
        *,
        time_attr: str = "training_iteration",
        metric: str | None = None,
        mode: str | None = None,
        seed: int = 0,
        lineage: Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._section = {**options, "name": "pbt", "space": space, "interval": interval}
        checked = PBTOptions.model_validate(self._section)  # is wrong now rather than in a trial
        if checked.optimizer_state == "reset":
            raise RecipeError("PBTScheduler: optimizer_state: expected 'copy', because checkpoints are copied whole")
        self._space = make_space(space)
        self._time_attr, self._metric, self._mode, self._seed = time_attr, metric, mode, seed
        self._lineage, self._chain = Lineage(lineage) if lineage else None, Chain()
        self._members: dict[str, Member] = {}
        self._ends: dict[int, Done] = {}
        self._checkpoints: dict[str, Any] = {}
        self._engine: PopulationBasedTraining | None = None

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:  # noqa: ARG002
        """Take the metric and the mode of `TuneConfig`; return False if the scheduler has its own."""
        if (self._metric and metric) or (self._mode and mode):
            return False
        self._metric, self._mode = self._metric or metric, self._mode or mode
        return True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:  # noqa: ARG002
        """Add a member.

        Raises:
            RecipeError: there is no metric or mode, or the population trains already.
        """
        if not self._metric or self._mode not in ("min", "max"):
            raise RecipeError("PBTScheduler: set metric and mode, here or in TuneConfig")
        if self._engine is not None:
            raise RecipeError(f"PBTScheduler: {trial} came after the others had begun; a population is whole from then")
        self._members[trial.trial_id] = Member(len(self._members), trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:  # noqa: ARG002
        """Pause a trial that has come to the end of its interval."""
        member = self._members[trial.trial_id]
        if member.work is None or result[self._time_attr] < member.work.until:
            return str(self.CONTINUE)
        snapshot = Snapshot(f"{trial.trial_id} at {member.work.until}", member.work.until)
        self._ends[member.number] = Done(
            member.work.attempt, snapshot, {str(self._metric): result.get(str(self._metric))}
        )
        member.work = None
        return str(self.PAUSE)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:  # noqa: ARG002
        """Let a member go that has ended."""
        self._retire(trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:  # noqa: ARG002
        """Let a member go that has failed more often than Tune allows."""
        self._retire(trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:  # noqa: ARG002
        """Let a member go that was ended from outside."""
        self._retire(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return a trial that can go on: first those that continue another one, while its checkpoint is there."""
        if self._engine is None:
            self._engine = self._make_engine()
            self._hand_out(self._engine, tune_controller)
        elif self._ends and all(member.work is None and member.waits for member in self._members.values()):
            self._decide(self._engine)
            self._hand_out(self._engine, tune_controller)
        ready = [member for member in self._members.values() if member.work is not None and member.waits]
        return min(ready, key=self._continues_itself).trial if ready else None

    def debug_string(self) -> str:
        """Return a line for Tune's log."""
        return f"PBTScheduler: {len(self._members)} members, {self._chain.rows} decisions"

    def _make_engine(self) -> PopulationBasedTraining:
        """Return the engine for the trials that there are."""
        given = [dict(dotted_fields(member.trial.config)) for member in self._members.values()]
        known = self._space.domains
        first = [{name: value for name, value in config.items() if name in known} for config in given]
        options = PBTOptions.model_validate({**self._section, "population": len(first), "first": first})
        check_guesses(options, self._space)
        objective = Objective(str(self._metric), "lower" if self._mode == "min" else "higher")
        return PopulationBasedTraining(Problem(self._space, objective, NO_END, self._seed), options)

    def _decide(self, engine: PopulationBasedTraining) -> None:
        """Tell the engine what all members have come to."""
        for member in self._members.values():
            if member.number in self._ends:
                digest = self._ends[member.number].snapshot.digest
                self._checkpoints[digest] = member.trial.latest_checkpoint_result
        ends, self._ends = self._ends, {}
        for number in sorted(ends):
            engine.tell(ends[number])

    def _hand_out(self, engine: PopulationBasedTraining, tune_controller: Any) -> None:
        """Give the members their next intervals; those that get none have failed for good, and stop."""
        works = {work.member: work for work in engine.ask(len(self._members))}
        for member in list(self._members.values()):
            if member.number in works:
                self._continue(member, works[member.number])
            else:
                tune_controller.request_stop_trial(member.trial)
        needed = engine.digests()
        self._checkpoints = {name: found for name, found in self._checkpoints.items() if name in needed}
        chain, lines = self._chain.extended(engine.drain())
        self._chain = chain
        if self._lineage and lines:
            self._lineage.append(lines)

    def _continue(self, member: Member, work: Work) -> None:
        """Let a member go on from a state with hyperparameters.

        Raises:
            RecipeError: its donor has left no checkpoint.
        """
        member.work = work
        member.trial.set_config(apply_overrides(member.trial.config, work.changes))
        if not work.snapshot.digest:
            return
        checkpoint = self._checkpoints.get(work.snapshot.digest)
        if checkpoint is None:
            raise RecipeError(
                f"PBTScheduler: no checkpoint of {work.snapshot.digest}; trials have to report one every "
                f"{self._section['interval']} {self._time_attr}"
            )
        # Ray's own scheduler puts a donor's checkpoint there too: to register it would hand it over for removal.
        member.trial.run_metadata.checkpoint_manager._latest_checkpoint_result = checkpoint

    def _continues_itself(self, member: Member) -> bool:
        return member.work is None or member.work.snapshot.digest.startswith(f"{member.trial.trial_id} ")

    def _retire(self, trial: Trial) -> None:
        """Go on without a member."""
        member = self._members.pop(trial.trial_id, None)
        if member is not None and self._engine is not None:
            self._ends.pop(member.number, None)
            self._engine.retire(member.number, str(trial.status).lower())
