"""Bayesian optimisation with a Gaussian process."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from search.chooser import Configuration, sampling
from search.rng import keyed_generator
from search.searcher import CandidateResult
from search.searchers.model_based import ModelBasedSearcher
from search.space import Space
from search.surrogate.encoding import Encoded, FloatArray
from search.surrogate.gaussian_process import Hyperparameters, Trend, walk
from search.surrogate.prior_mean import PriorMean
from search.surrogate.targets import standardised

GP_INITIAL = 6
"""Candidates that are drawn at random before the first model."""
ACQUISITION_SAMPLES = 1000
MUTANTS = 300
GP_PARENTS = 5
DRAWS = 4
"""Draws of the hyperparameters, whose expected improvements are averaged."""
ACQUISITION_STEPS = 6
"""Metropolis steps of each draw for a candidate; it goes on where it was for the last one."""
SETTLED = 80
"""Candidates from which on half of the draws are used, with a third of the steps: they hardly differ any more."""
INITIAL_WITH_PRIOR = 3
LEAST_RESULTS = 5
"""Results below which an earlier search is not used."""
PRIOR_SPREAD = 0.7
"""Standard deviation of the coefficients of priors, whose guess sums to 1."""


class GaussianProcessSearcher(ModelBasedSearcher):
    """Proposes what a Gaussian process over the decisions expects to improve most.

    Outstanding candidates count as the mean (constant liar, Ginsbourger et al. 2010), failures as the worst; see
    `standardised`. The improvement is maximised over random configurations and mutants of the best.

    Earlier searches give the first candidates, the best that each one predicts, and the mean function: the mean of
    their predictions, each times a coefficient that own results correct, so that one that does not fit loses its say.

    Args:
        space: what is searched.
        seed: of all draws.
        priors: results of earlier searches, as configurations of this space.

    Source: Mockus 1978; Snoek et al. 2012; the mean function: Rasmussen and Williams 2006, section 2.7.
    """

    def __init__(self, space: Space, seed: int, priors: Sequence[Sequence[CandidateResult]] = ()) -> None:
        super().__init__(space, seed)
        self._draws: list[dict[str, Any]] = [{} for _ in range(DRAWS)]
        means = [_prior_mean(prior, keyed_generator(seed, "prior", place)) for place, prior in enumerate(priors)]
        self._priors = [mean for mean in means if mean and mean.reliability]

    def state_dict(self) -> dict[str, Any]:
        """Return all candidates, results and draws of hyperparameters."""
        return {**super().state_dict(), "draws": self._draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from all candidates, results and draws of hyperparameters."""
        super().load_state_dict(state)
        self._draws = list(state["draws"])

    def _choose(self, rng: np.random.Generator) -> Configuration | None:
        turn = len(self._configurations)
        if turn < len(self._priors):
            pool = self._pool(rng)
            return self._first_allowed(pool, -self._priors[turn].predict(pool))
        if turn < (INITIAL_WITH_PRIOR if self._priors else GP_INITIAL) or not self._measured:
            return self._draw(rng)
        pool = self._pool(rng)
        known = list(self._configurations.values())
        encoded, trend = Encoded.of([*known, *pool]), self._trend([*known, *pool])
        return self._first_allowed(pool, self._improvement(encoded, trend, slice(len(known), None), rng))

    def _pool(self, rng: np.random.Generator) -> list[Configuration]:
        return list(self._unasked(self._drawn(rng)))

    def _drawn(self, rng: np.random.Generator) -> Iterator[Configuration]:
        draws = (self.space.run(sampling(rng)) for _ in range(ACQUISITION_SAMPLES))
        return chain(draws, self._mutants(self._best(GP_PARENTS), MUTANTS, rng))

    def _trend(self, configurations: Sequence[Configuration]) -> Trend | None:
        """Return what the priors say: their mean, each with a factor that own results correct, and a constant."""
        if not self._priors:
            return None
        columns = [np.ones(len(configurations)), *(prior.predict(configurations) for prior in self._priors)]
        guess = np.array([0.0, *(1 / len(self._priors) for _ in self._priors)])
        return Trend(np.stack(columns, axis=1), guess, PRIOR_SPREAD)

    def _improvement(self, encoded: Encoded, trend: Trend | None, rows: slice, rng: np.random.Generator) -> FloatArray:
        """Return the expected improvement of some rows, averaged over draws of the hyperparameters."""
        targets, total = self._targets(), np.zeros(len(encoded.codes[rows]))
        settled = len(targets) >= SETTLED
        steps = ACQUISITION_STEPS // 3 if settled else ACQUISITION_STEPS
        for place, draw in enumerate(self._draws[: DRAWS // 2 if settled else DRAWS]):
            process = walk(encoded, targets, _hyperparameters(draw, encoded), steps, rng, trend)
            self._draws[place] = _plain(process.hyperparameters, encoded)
            total += process.expected_improvement(rows)
        return total


def _prior_mean(results: Sequence[CandidateResult], rng: np.random.Generator) -> PriorMean | None:
    """Return the model of an earlier search, or None if it has too few results."""
    told = [(result.candidate.configuration, -result.fitness) for result in results if result.fitness is not None]
    if len(told) < LEAST_RESULTS:
        return None
    return PriorMean([each for each, _ in told], standardised(np.array([loss for _, loss in told])), rng)


def _hyperparameters(draw: Mapping[str, Any], encoded: Encoded) -> Hyperparameters:
    """Return hyperparameters as an earlier proposal left them; decisions that are new have those of the prior."""
    prior = Hyperparameters.prior(encoded.ordered)
    lengths = draw.get("lengths", {})
    known = [lengths.get(path, median) for path, median in zip(encoded.paths, prior.lengths.tolist(), strict=True)]
    return Hyperparameters(np.array(known), draw.get("additive", prior.additive), draw.get("noise", prior.noise))


def _plain(hyperparameters: Hyperparameters, encoded: Encoded) -> dict[str, Any]:
    lengths = dict(zip(encoded.paths, hyperparameters.lengths.tolist(), strict=True))
    return {"lengths": lengths, "additive": hyperparameters.additive, "noise": hyperparameters.noise}
