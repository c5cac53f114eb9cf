"""The tree-structured Parzen estimator, by Optuna."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from search.chooser import Configuration, Decision
from search.domains import Domain, Float, Int, Ordered
from search.rng import keyed_generator, keyed_seed
from search.searcher import Candidate, CandidateResult
from search.searchers.proposals import SequentialSearcher, key_of, new_draw
from search.space import Space

TPE_ATTEMPTS = 20


class TPESearcher(SequentialSearcher):
    """Proposes what is likely among good candidates and unlikely among bad ones.

    Optuna's sampler, multivariate and by groups of dimensions, for conditions; outstanding candidates count as bad
    (constant liar). Each proposal has a sampler and a study of its own, made of all results so far, so that nothing of
    Optuna's has to be saved.

    Source: Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization; Falkner et al. 2018 (BOHB, multivariate).
    """

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(space, seed)
        self._results: dict[int, tuple[Configuration, TrialState, float | None]] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    def tell(self, results: Sequence[CandidateResult]) -> None:
        """Learn from results; failures count as the worst."""
        for result in results:
            state = TrialState.FAIL if result.fitness is None else TrialState.COMPLETE
            self._results[result.candidate.number] = (result.candidate.configuration, state, result.fitness)

    def state_dict(self) -> dict[str, Any]:
        """Return all candidates and results."""
        return {
            "results": [
                [number, configuration.genome.values(), state.name, fitness]
                for number, (configuration, state, fitness) in sorted(self._results.items())
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from all candidates and results."""
        self._results = {
            number: (self.space.replay(values), TrialState[name], fitness)
            for number, values, name, fitness in state["results"]
        }

    def _propose(self, number: int) -> Configuration:
        """Return a proposal that is new and within the limits of the space, or a draw after some that are not."""
        asked = {key_of(configuration) for configuration, *_ in self._results.values()}
        for attempt in range(TPE_ATTEMPTS):
            trial = self._study(keyed_seed(self.seed, "candidate", number, *[attempt] * (attempt > 0))).ask()
            configuration = self.space.run(partial(_suggested, trial))
            if key_of(configuration) not in asked and self.space.allows(configuration):
                return configuration
        rng = keyed_generator(self.seed, "candidate", number)
        return new_draw(self.space, asked, rng) or self.space.sample(rng)

    def _record(self, candidate: Candidate) -> None:
        """Keep it as outstanding."""
        self._results[candidate.number] = (candidate.configuration, TrialState.RUNNING, None)

    def _study(self, seed: int) -> optuna.Study:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of `group`
            sampler = optuna.samplers.TPESampler(seed=seed, group=True)
        study = optuna.create_study(sampler=sampler, direction="maximize")
        worst = min((fitness for *_, fitness in self._results.values() if fitness is not None), default=0.0)
        study.add_trials([_trial(*result, worst) for _, result in sorted(self._results.items())])
        return study


def _trial(configuration: Configuration, state: TrialState, fitness: float | None, worst: float) -> FrozenTrial:
    decisions = [one for one in configuration.genome.decisions if one.domain.contains(one.value)]
    failed = state is TrialState.FAIL
    trial: FrozenTrial = create_trial(
        state=TrialState.COMPLETE if failed else state,
        value=worst if failed else fitness,
        params={one.path: _parameter(one) for one in decisions},
        distributions={one.path: _distribution(one.domain) for one in decisions},
    )
    return trial


def _distribution(domain: Domain) -> FloatDistribution | IntDistribution | CategoricalDistribution:
    """Return Optuna's distribution: numbers on their scale, other values by their index."""
    if isinstance(domain, Float):
        if domain.scale == "one-minus":
            return FloatDistribution(1 - domain.high, 1 - domain.low, log=True)
        return FloatDistribution(domain.low, domain.high, log=domain.scale == "log")
    if isinstance(domain, Int):
        return IntDistribution(domain.low, domain.high, log=domain.scale == "log")
    count = len(domain.extremes())
    return IntDistribution(0, count - 1) if isinstance(domain, Ordered) else CategoricalDistribution(range(count))


def _parameter(decision: Decision) -> Any:
    """Return the value as Optuna has it."""
    domain, value = decision.domain, decision.value
    if isinstance(domain, Float) and domain.scale == "one-minus":
        return min(max(1 - value, 1 - domain.high), 1 - domain.low)
    return value if isinstance(domain, Float | Int) else list(domain.extremes()).index(value)


def _suggested(trial: Trial, path: str, domain: Domain) -> Any:
    asked = _distribution(domain)
    if isinstance(asked, FloatDistribution):
        number = trial.suggest_float(path, asked.low, asked.high, log=asked.log)
        return domain.nearest(1 - number if isinstance(domain, Float) and domain.scale == "one-minus" else number)
    if isinstance(asked, IntDistribution):
        index = trial.suggest_int(path, asked.low, asked.high, log=asked.log)
    else:
        index = trial.suggest_categorical(path, asked.choices)
    return index if isinstance(domain, Int) else domain.extremes()[index]
