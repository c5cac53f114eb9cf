"""Predictors: they rank what they have not seen, and their leave-one-out predictions are what they say."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.registry import resolve
from search.chooser import Configuration
from search.predictor.features import Features
from search.predictor.gaussian_process import GaussianProcessPredictor
from search.predictor.predictor import Predictor, rank_correlation, rank_correlations
from search.predictor.ridge import Ridge
from search.searcher import CandidateResult
from search.searchers.nars import NARSSearcher
from search.space import make_space
from search.surrogate.encoding import Encoded, FloatArray
from search.surrogate.gaussian_process import GaussianProcess
from search.surrogate.targets import standardised
from search.tables import PREDICTORS

SPACE = make_space(
    {
        "norm": {"type": "choice", "values": ["none", "batch", "layer"]},
        "rate": {"type": "float", "low": 1e-4, "high": 1.0, "scale": "log"},
        "warmup": {"type": "int", "low": 0, "high": 100, "when": {"norm": ["none", "batch"]}},
        "width": {"type": "ordered", "values": [8, 16, 32, 64]},
    }
)


def loss_of(changes: Any) -> float:
    return abs(float(np.log10(changes["rate"])) + 2) + (changes["norm"] != "layer") + 16 / changes["width"]


def drawn(count: int, seed: int) -> tuple[list[Configuration], FloatArray]:
    some = [SPACE.sample(np.random.default_rng([seed, number])) for number in range(count)]
    return some, standardised(np.array([loss_of(each.changes) for each in some]))


@pytest.mark.parametrize("name", PREDICTORS)
def test_unseen_configurations_are_ranked(name: str) -> None:
    predictor: Predictor = resolve(PREDICTORS, name, "predictor")()
    known, targets = drawn(60, 0)
    predictor.fit(known, targets, np.random.default_rng(0))
    unseen, losses = drawn(200, 1)
    mean, spread = predictor.predict(unseen)
    assert rank_correlation(mean, losses) > (0.6 if name == "ridge" else 0.75)
    assert spread.shape == mean.shape
    assert (spread > 0).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), count=st.integers(6, 15))
def test_ridge_leaves_one_out_as_if_it_were_fitted_without_it(seed: int, count: int) -> None:
    known, targets = drawn(count, seed)
    ridge = Ridge()
    ridge.fit(known, targets, np.random.default_rng(0))
    rows, penalty = Features(known).rows(known), ridge.penalty
    for place, left_out in enumerate(ridge.leave_one_out()):
        rest = np.arange(count) != place
        centre, mean = rows[rest].mean(axis=0), targets[rest].mean()
        x, y = rows[rest] - centre, targets[rest] - mean
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(rows.shape[1]), x.T @ y)
        assert left_out == pytest.approx(mean + (rows[place] - centre) @ weights, abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), count=st.integers(4, 12))
def test_a_process_leaves_one_out_as_if_it_were_fitted_without_it(seed: int, count: int) -> None:
    known, targets = drawn(count, seed)
    predictor = GaussianProcessPredictor()
    predictor.fit(known, targets, np.random.default_rng(seed))
    encoded, hyper = Encoded.of(known), predictor.hyperparameters
    for place, left_out in enumerate(predictor.leave_one_out()):
        order = np.array([*(each for each in range(count) if each != place), place])
        without = GaussianProcess(encoded.rows(order), targets[order[:-1]], hyper)
        assert left_out == pytest.approx(without.predict(slice(count - 1, None))[0][0], abs=1e-5)


def test_rank_correlations_are_those_of_ranks() -> None:
    one = np.array([1.0, 2.0, 3.0, 10.0])
    assert rank_correlation(one, np.exp(one)) == pytest.approx(1)
    assert rank_correlation(one, -one) == pytest.approx(-1)
    assert rank_correlation(one, np.ones(4)) == 0


def test_nars_takes_the_predictor_that_ranks_best_and_says_so() -> None:
    searcher = NARSSearcher(SPACE, 0)
    assert searcher.remark() == {}
    for number in range(12):
        [candidate] = searcher.ask([number])
        searcher.tell([CandidateResult(candidate, -loss_of(candidate.configuration.changes))])
    remark = searcher.remark()
    assert remark["rank_correlations"].keys() == PREDICTORS.keys()
    assert remark["predictor"] == max(remark["rank_correlations"], key=remark["rank_correlations"].get)
    forced = NARSSearcher(SPACE, 0, "trees")
    forced.load_state_dict(searcher.state_dict())
    assert forced.remark()["predictor"] == "trees"
    known, targets = drawn(30, 2)
    assert set(rank_correlations(known, targets, np.random.default_rng(0))) == set(PREDICTORS)
