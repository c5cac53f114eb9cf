"""Searches in a loop of the user's own, without Ray and without files: ask for a trial, train it, tell its value.

    study = PBT(space, steps=1000, interval=100)
    while trial := study.ask():
        model = build(trial.params)
        if trial.state:
            model.load_state_dict(trial.state)
        loss = train(model, trial.step, trial.until)
        study.tell(trial, loss, model.state_dict())

Each class is a method of `raytrain list searches` with the same options, and makes the same decisions. Trials may be
asked for and told in any order, as by several threads or processes that the caller starts.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from raytrain.errors import RecipeError, TrainingError
from raytrain.recipe import Options, explain_errors, options_parameter
from raytrain.registry import resolve
from search.checks import check_factors, check_guesses, draw_probes
from search.options import SearchOptions
from search.scheduling.scheduler import LineageRow, Problem, Scheduler
from search.scheduling.segments import Objective, SegmentReport
from search.scheduling.work import Done, Failed, Snapshot, Work, WorkOutcome
from search.space import Space, SpaceFunction, make_space
from search.tables import SEARCHES

VALUE = "value"
"""The metric of a study: it is told one."""

OF_A_RUN = ("metric", "timeout_seconds", "seconds", "limits")
"""Options of a search recipe that need its clock or its base recipe."""

SpaceLike = Space | SpaceFunction | Mapping[str, Any] | str
"""A space, a function of a chooser, a table of dimensions, or "module:function"."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A stretch of training to do.

    Attributes:
        number: of the trial, or of the member of a population.
        params: the hyperparameters: name -> value.
        step: steps that are done: 0 where training begins.
        until: step to train to.
        state: a copy of what was told at `step`, by this trial or by the one that it inherits from; None at step 0.
        seed: of data order and first weights.
        reset_optimizer: whether the state's optimizer is to start new.
        attempt: names this attempt; a trial whose attempt failed is handed out again under another one.

    >>> trial = Random({"x": {"type": "int", "low": 3, "high": 4}}).ask()
    >>> trial.params["x"] in (3, 4), trial.step, trial.until
    (True, 0, 1)
    """

    number: int
    params: Mapping[str, Any]
    step: int
    until: int
    state: Any
    seed: int
    reset_optimizer: bool
    attempt: str


class Study:
    """A search that is asked and told.

    Args:
        space: what is searched.
        steps: of a whole training, in units of the caller's; 1: a trial is evaluated at once.
        mode: whether lower ("min") or higher ("max") values are better.
        seed: of all draws.
        options: of the method, as in a recipe's section [search].

    Attributes:
        lineage: a row for each decision so far, as in the file of that name.

    Raises:
        RecipeError: an option or the space is wrong.

    >>> study: Study = Grid({"x": {"type": "bool"}})
    >>> trials = [study.ask(), study.ask(), study.ask()]  # as by several threads
    >>> for trial in reversed(trials[:2]):
    ...     study.tell(trial, float(trial.params["x"]))
    >>> trials[2], study.ask(), study.best_params
    (None, None, {'x': False})
    """

    name: ClassVar[str]
    """Of the method in a recipe."""

    def __init__(
        self,
        space: SpaceLike,
        *,
        steps: int = 1,
        mode: Literal["min", "max"] = "min",
        seed: int = 0,
        **options: Any,
    ) -> None:
        if mode not in ("min", "max"):
            raise RecipeError(f"{type(self).__name__}.mode: expected min or max; got {mode!r}")
        method = resolve(SEARCHES, self.name, "search.name")
        parsed = self._parse(options_parameter(method, SearchOptions), options)
        searched = _space_of(space)
        parsed.check_interval(steps, "steps")
        check_factors(parsed, searched)
        check_guesses(parsed, searched)
        objective = Objective(VALUE, "higher" if mode == "max" else "lower")
        self.steps = steps
        self.lineage: list[LineageRow] = []
        self._scheduler: Scheduler = method(Problem(searched, objective, steps, seed, seed), parsed)
        self._states: dict[str, Any] = {}

    def ask(self) -> Trial | None:
        """Return what to train next.

        Returns:
            None: nothing, until a trial that was asked for is told; if all were told, the search is done.

        Raises:
            SearchError: all trials failed.
        """
        work = next(iter(self._scheduler.ask(1)), None)
        self.lineage += self._scheduler.drain()
        return self._trial(work) if work else None

    def tell(self, trial: Trial, value: float | None, state: Any = None) -> None:
        """Learn how a trial ended.

        Args:
            trial: as `ask` returned it.
            value: measured at step `trial.until`; None, or one that is not finite: it failed.
            state: of the model there, of which a copy is kept as long as it can be needed. Required where training can
                go on from it, at a step before the last.

        Raises:
            RecipeError: the state is missing, or the trial is not under way.
            SearchError: all members failed.
        """
        if value is not None and state is None and trial.until < self.steps:
            raise RecipeError(
                f"state: expected what training goes on from at step {trial.until} of {self.steps}, such as "
                "model.state_dict(); got none"
            )
        if refused := self._scheduler.tell(self._outcome(trial, value, state)):
            raise RecipeError(f"trial: {refused}")
        self.lineage += self._scheduler.drain()
        kept = self._scheduler.digests()
        self._states = {name: kept_state for name, kept_state in self._states.items() if name in kept}

    @property
    def best_value(self) -> float:
        """The best value that was told."""
        return self._best().score

    @property
    def best_params(self) -> dict[str, Any]:
        """The hyperparameters of the best value; of a population, those of its last stretch of training."""
        return dict(self._best().segment.configuration.changes)

    @property
    def best_state(self) -> Any:
        """A copy of the state that was told with the best value; None: none was."""
        return copy.deepcopy(self._states.get(self._best().snapshot.digest))

    def state_dict(self) -> dict[str, Any]:
        """Return all that later decisions depend on: plain data, and the states as they were told."""
        return {"decisions": self._scheduler.state_dict(), "states": dict(self._states), "lineage": list(self.lineage)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; trials that were under way then are handed out again."""
        self._scheduler.load_state_dict(state["decisions"])
        self._states, self.lineage = dict(state["states"]), list(state["lineage"])

    def _parse(self, declared: type[Options], options: Mapping[str, Any]) -> SearchOptions:
        for name in OF_A_RUN:
            if name in options:
                raise RecipeError(f"{type(self).__name__}.{name}: only a search recipe has it; leave it out")
        try:
            parsed: Any = declared.model_validate({"name": self.name, "space": {}, **options})
        except ValidationError as error:
            raise RecipeError(explain_errors(error, type(self).__name__)) from None
        found: SearchOptions = parsed
        return found

    def _trial(self, work: Work) -> Trial:
        return Trial(
            number=work.member,
            params=dict(work.changes),
            step=work.snapshot.step,
            until=work.until,
            state=copy.deepcopy(self._states[work.snapshot.digest]) if work.snapshot.digest else None,
            seed=work.seed,
            reset_optimizer=work.reset_optimizer,
            attempt=work.attempt,
        )

    def _outcome(self, trial: Trial, value: float | None, state: Any) -> WorkOutcome:
        if value is None:
            return Failed(trial.attempt, "error", "it was told without a value")
        if state is None:
            return Done(trial.attempt, Snapshot("", trial.until), {VALUE: value})
        self._states[trial.attempt] = copy.deepcopy(state)
        return Done(trial.attempt, Snapshot(trial.attempt, trial.until), {VALUE: value})

    def _best(self) -> SegmentReport:
        if self._scheduler.best is None:
            raise TrainingError("no trial has a value yet; tell one first")
        return self._scheduler.best


class Random(Study):
    """Independent draws.

    >>> study = Random({"x": {"type": "float", "low": -1, "high": 1}}, trials=20)
    >>> while trial := study.ask():
    ...     study.tell(trial, trial.params["x"] ** 2)
    >>> study.best_value < 0.05
    True
    """

    name = "random"


class Grid(Study):
    """Every combination of `points` values of each dimension.

    >>> study = Grid({"x": {"type": "int", "low": 0, "high": 4}, "y": {"type": "bool"}}, points=5)
    >>> while trial := study.ask():
    ...     study.tell(trial, trial.params["x"] + trial.params["y"])
    >>> study.best_params, len(study.lineage)
    ({'x': 0, 'y': False}, 20)
    """

    name = "grid"


class Sobol(Study):
    """Points of a scrambled Sobol sequence (Owen 1998).

    >>> study = Sobol({"x": {"type": "float", "low": 0, "high": 1}}, trials=16)
    >>> while trial := study.ask():
    ...     study.tell(trial, abs(trial.params["x"] - 0.5))
    >>> study.best_value < 1 / 16
    True
    """

    name = "sobol"


class Evolution(Study):
    """Regularised evolution (Real et al. 2019): mutants of the best of a few of the newest.

    >>> study = Evolution(lambda choose: {"bits": [choose.bool(f"bit{i}") for i in range(8)]}, mode="max", trials=100)
    >>> while trial := study.ask():
    ...     study.tell(trial, sum(trial.params["bits"]))
    >>> study.best_value >= 7
    True
    """

    name = "evolution"


class MCTS(Study):
    """Monte Carlo tree search over the decisions (after DeepArchitect, Negrinho and Gordon 2017).

    >>> study = MCTS(lambda choose: {"bits": [choose.bool(f"bit{i}") for i in range(6)]}, mode="max", trials=60)
    >>> while trial := study.ask():
    ...     study.tell(trial, sum(trial.params["bits"]))
    >>> study.best_value >= 5
    True
    """

    name = "mcts"


class GP(Study):
    """Bayesian optimisation by a Gaussian process (Snoek et al. 2012).

    >>> study = GP({"x": {"type": "float", "low": -1, "high": 1}}, trials=12)
    >>> while trial := study.ask():
    ...     study.tell(trial, (trial.params["x"] - 0.3) ** 2)
    >>> round(study.best_params["x"], 1)
    0.3
    """

    name = "gp"


class NARS(Study):
    """Evolution by what a predictor expects (after FBNetV3's NARS, Dai et al. 2021).

    >>> study = NARS({"x": {"type": "float", "low": -1, "high": 1}}, trials=12)
    >>> while trial := study.ask():
    ...     study.tell(trial, (trial.params["x"] - 0.3) ** 2)
    >>> study.best_value < 0.05
    True
    """

    name = "nars"


class TPE(Study):
    """Proposals of Optuna's tree-structured Parzen estimator (Bergstra et al. 2011).

    >>> study = TPE({"x": {"type": "float", "low": -1, "high": 1}}, trials=20)
    >>> while trial := study.ask():
    ...     study.tell(trial, (trial.params["x"] - 0.3) ** 2)
    >>> study.best_value < 0.05
    True
    """

    name = "tpe"


class ASHA(Study):
    """Asynchronous successive halving (Li et al. 2020): of each rung the best 1/`eta` go on, from where they paused.

    >>> study = ASHA({"lr": {"type": "float", "low": 0.01, "high": 1}}, steps=9, interval=1, trials=9)
    >>> trained = 0
    >>> while trial := study.ask():
    ...     theta = trial.state or 0.0  # minimise (theta - 3)^2
    ...     for _ in range(trial.step, trial.until):
    ...         theta -= trial.params["lr"] * 2 * (theta - 3)
    ...     study.tell(trial, (theta - 3) ** 2, state=theta)
    ...     trained += trial.until - trial.step
    >>> trained  # nine trials to step 1, the best three of them to step 3, the best of these to step 9
    21
    >>> study.best_value < 1e-6
    True
    """

    name = "asha"


class Hyperband(Study):
    """Asynchronous Hyperband (Li et al. 2018): brackets of `ASHA` whose lowest rungs differ.

    >>> study = Hyperband({"lr": {"type": "float", "low": 0.01, "high": 1}}, steps=9, interval=1, trials=17)
    >>> begun = []
    >>> while trial := study.ask():
    ...     theta = trial.state or 0.0  # minimise (theta - 3)^2
    ...     begun += [trial.until] if trial.step == 0 else []
    ...     for _ in range(trial.step, trial.until):
    ...         theta -= trial.params["lr"] * 2 * (theta - 3)
    ...     study.tell(trial, (theta - 3) ** 2, state=theta)
    >>> {step: begun.count(step) for step in sorted(set(begun))}  # trials and their first rung
    {1: 9, 3: 5, 9: 3}
    >>> study.best_value < 1e-6
    True
    """

    name = "hyperband"


class Median(Study):
    """Trials that are worse than the median of the others end early (Golovin et al. 2017).

    >>> study = Median({"limit": {"type": "float", "low": 0, "high": 1}}, steps=10, interval=2, trials=9)
    >>> while trial := study.ask():
    ...     loss = trial.params["limit"] + 1 / trial.until  # a learning curve
    ...     study.tell(trial, loss, state="weights")
    >>> ends = [row["action"] for row in study.lineage if row["action"] in ("end", "stop")]
    >>> ends.count("end"), ends.count("stop")
    (5, 4)
    >>> study.best_value < 0.35
    True
    """

    name = "median"


class Extrapolation(Study):
    """Trials whose loss curve is unlikely to lead below the best end early (after Domhan et al. 2015).

    >>> study = Extrapolation({"lr": {"type": "float", "low": 0.01, "high": 1}}, steps=20, interval=1, trials=9)
    >>> while trial := study.ask():
    ...     distance = 1.0 if trial.state is None else trial.state
    ...     distance *= (1 - trial.params["lr"]) ** (trial.until - trial.step)
    ...     study.tell(trial, distance, state=distance)
    >>> study.best_value < 0.01
    True
    """

    name = "extrapolation"


class PBT(Study):
    """Population based training (Jaderberg et al. 2017): members copy better ones while they train.

    The members differ in hyperparameters, which change each `interval` steps. A member that copies another one goes on
    from its state.

    >>> space = {"lr": {"type": "float", "low": 1e-4, "high": 0.5, "scale": "log"}}
    >>> study = PBT(space, steps=100, interval=10, population=8)
    >>> while trial := study.ask():
    ...     theta = trial.state or 0.0  # minimise (theta - 3)^2
    ...     for _ in range(trial.step, trial.until):
    ...         theta -= trial.params["lr"] * 2 * (theta - 3)
    ...     study.tell(trial, (theta - 3) ** 2, state=theta)
    >>> study.best_value < 1e-6
    True
    """

    name = "pbt"


def _space_of(space: SpaceLike) -> Space:
    """Return a space, of which a function has told its domains."""
    if isinstance(space, Space):
        found = space
    elif callable(space):
        found = Space(space)
    else:
        found = make_space(space)
    for _ in draw_probes(found):
        pass
    return found
