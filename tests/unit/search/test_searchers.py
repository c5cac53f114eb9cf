"""Searchers: laws that hold for each of them, in any order of results; and the Gaussian process against NumPy."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.errors import RecipeError
from raytrain.registry import resolve
from search.domains import Float
from search.limits import Limit
from search.searcher import Candidate, CandidateResult, Searcher
from search.searchers.gp import GaussianProcessSearcher
from search.space import Space, make_space
from search.surrogate.encoding import Encoded
from search.surrogate.gaussian_process import GaussianProcess, Hyperparameters, Trend, walk
from search.tables import SEARCHERS

TABLE = {
    "kind": {"type": "choice", "values": ["a", "b"]},
    "rate": {"type": "float", "low": 1e-4, "high": 1.0, "scale": "log"},
    "beta": {"type": "float", "low": 0.5, "high": 0.999, "scale": "one-minus", "when": {"kind": "b"}},
    "width": {"type": "ordered", "values": [8, 16, 32]},
    "depth": {"type": "int", "low": 1, "high": 4},
    "bias": {"type": "bool"},
}
LEARNING = ["evolution", "gp", "mcts", "nars", "tpe"]


def searcher_of(name: str, space: Space | None = None, seed: int = 0) -> Searcher:
    searcher: Searcher = resolve(SEARCHERS, name, "searcher")(space or make_space(TABLE), seed)
    return searcher


def fitness_of(candidate: Candidate) -> float | None:
    """Least where the rate is 0.01 and the width 32; one kind fails for deep ones."""
    changes = candidate.configuration.changes
    if changes["kind"] == "a" and changes["depth"] == 4:
        return None
    return -abs(float(np.log10(changes["rate"])) + 2) - (changes["width"] != 32) - 0.1


def told(searcher: Searcher, candidates: list[Candidate]) -> None:
    searcher.tell([CandidateResult(candidate, fitness_of(candidate)) for candidate in candidates])


@pytest.mark.parametrize("name", SEARCHERS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_candidates_are_valid_in_any_order_of_results(name: str, data: st.DataObject) -> None:
    searcher, waiting = searcher_of(name), []
    for number in range(14):
        waiting += searcher.ask([number])
        for decision in waiting[-1].configuration.genome.decisions:
            assert decision.domain.contains(decision.value)
        while waiting and data.draw(st.booleans()):
            told(searcher, [waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))])


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_search_goes_on_with_the_same_proposals(name: str) -> None:
    whole, cut = searcher_of(name), searcher_of(name)
    foreign = Candidate(-1, whole.space.sample(np.random.default_rng(5)))
    for searcher in (whole, cut):
        for number in range(10):
            told(searcher, searcher.ask([number]))
        searcher.ask([10])  # outstanding
        told(searcher, [foreign])
    again = searcher_of(name)
    again.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    for number in range(11, 14):
        one, other = whole.ask([number]), again.ask([number])
        assert [each.configuration.changes for each in one] == [each.configuration.changes for each in other]
        told(whole, one)
        told(again, other)


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_searcher_that_is_told_only_failures_goes_on(name: str) -> None:
    searcher = searcher_of(name)
    for number in range(12):
        searcher.tell([CandidateResult(candidate, None) for candidate in searcher.ask([number])])
    assert searcher.ask([12])


@pytest.mark.parametrize("name", LEARNING)
def test_others_results_are_learned_from(name: str) -> None:
    """What another searcher or the user evaluated counts as much as what was asked."""
    searcher, rng = searcher_of(name), np.random.default_rng(0)
    foreign = [Candidate(1000 + place, searcher.space.sample(rng)) for place in range(30)]
    told(searcher, foreign)
    proposals = [searcher.ask([number])[0] for number in range(8)]
    blind = [Candidate(number, searcher.space.sample(rng)) for number in range(200)]
    usual = np.median([fitness_of(each) or -5 for each in blind])
    assert np.median([fitness_of(each) or -5 for each in proposals]) > usual


@pytest.mark.parametrize("name", ["gp", "grid", "mcts", "nars", "random", "sobol"])
def test_nothing_is_asked_twice_and_a_space_can_be_spent(name: str) -> None:
    space = make_space({"kind": TABLE["kind"], "depth": {"type": "int", "low": 1, "high": 3}})
    searcher, asked = searcher_of(name, space), []
    for number in range(9):
        for candidate in searcher.ask([number]):
            asked.append(json.dumps(candidate.configuration.changes))
            searcher.tell([CandidateResult(candidate, float(len(asked)))])
    assert len(asked) == len(set(asked)) == 6


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_space_with_one_candidate_is_searched(name: str) -> None:
    searcher = searcher_of(name, Space(lambda choose: {"batch": choose.one_of("batch", [16])}))
    for number in range(8):
        for candidate in searcher.ask([number]):
            assert candidate.configuration.changes == {"batch": 16}
            searcher.tell([CandidateResult(candidate, 1.0)])


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_candidate_over_the_limit_is_never_asked(name: str) -> None:
    """Half of the draws are."""
    limit = Limit("search.limits.parameters", 40, lambda changes: int(changes["width"]) * int(changes["depth"]))
    searcher, asked = searcher_of(name, make_space(TABLE).limited(limit)), []
    for number in range(24):
        candidates = searcher.ask([number])
        asked += candidates
        told(searcher, candidates)
    assert len(asked) >= 20
    assert all(each.configuration.changes["width"] * each.configuration.changes["depth"] <= 40 for each in asked)


def test_a_limit_that_nothing_keeps_to_says_the_smallest() -> None:
    limit = Limit("search.limits.parameters", 7, lambda changes: int(changes["width"]))
    with pytest.raises(RecipeError) as error:
        searcher_of("random", make_space(TABLE).limited(limit)).ask([0])
    assert str(error.value) == "search.limits.parameters: none of 10,000 draws has at most 7; the smallest has 8"


@pytest.mark.parametrize("name", LEARNING)
def test_nothing_is_asked_twice(name: str) -> None:
    """Here 16 of 24 candidates, of which the best ones are proposed again and again."""
    table = {"kind": TABLE["kind"], "width": TABLE["width"], "depth": TABLE["depth"]}
    searcher, asked = searcher_of(name, make_space(table)), []
    for number in range(16):
        [candidate] = searcher.ask([number])
        asked.append(json.dumps(candidate.configuration.changes))
        changes = candidate.configuration.changes
        searcher.tell([CandidateResult(candidate, -changes["depth"] - 8 / changes["width"])])
    assert len(set(asked)) == len(asked)


def test_sobol_fills_a_space_more_evenly_than_draws() -> None:
    table = {"a": {"type": "float", "low": 0, "high": 1}, "b": {"type": "float", "low": 0, "high": 1}}

    def cells(name: str, seed: int) -> int:
        points = searcher_of(name, make_space(table), seed).ask(range(16))
        found = [each.configuration.changes for each in points]
        return len({(int(each["a"] * 4), int(each["b"] * 4)) for each in found})

    assert all(cells("sobol", seed) == 16 for seed in range(5)), "one point in each of 16 cells"
    assert all(cells("random", seed) < 16 for seed in range(5))


def test_evolution_mutates_one_decision_of_the_best() -> None:
    searcher = searcher_of("evolution")
    parents = searcher.ask(range(5))
    searcher.tell([CandidateResult(each, 1.0 if each.number == 2 else 0.0) for each in parents])
    best = parents[2].configuration.genome.values()
    for number in range(5, 25):
        child = searcher.ask([number])[0].configuration.genome.values()
        shared = best.keys() & child.keys()
        changed = {path for path in shared if best[path] != child[path]}
        assert len(changed) <= 1
        assert changed or best.keys() != child.keys()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 12))
def test_the_posterior_is_that_of_dense_algebra(seed: int, count: int) -> None:
    """Rasmussen and Williams, equations 2.25 and 2.26, written out with an inverse."""
    rng, space = np.random.default_rng(seed), make_space(TABLE)
    encoded = Encoded.of([space.sample(rng) for _ in range(count + 3)])
    targets = rng.normal(size=count)
    hyper = Hyperparameters(rng.uniform(0.3, 2, len(encoded.paths)), float(rng.random()), float(rng.uniform(0.01, 1)))
    process = GaussianProcess(encoded, targets, hyper)

    def covariance(one: int, other: int) -> float:
        matern = []
        for column, length in enumerate(hyper.lengths):
            a, b = encoded.codes[one, column], encoded.codes[other, column]
            inactive = 0 in (a, b) and a != b
            apart = 1.0 if inactive else abs(a - b) / 64 if encoded.ordered[column] else float(a != b)
            r = 5**0.5 * apart / length
            matern.append((1 + r + r * r / 3) * np.exp(-r))
        pairs = np.mean([a * b for a, b in itertools.combinations(matern, 2)])
        whole = hyper.additive * np.mean(matern) + (1 - hyper.additive) * np.prod(matern)
        return float(0.5 * pairs + 0.5 * whole)

    every = np.array([[covariance(one, other) for other in range(count + 3)] for one in range(count + 3)])
    inverse = np.linalg.inv(every[:count, :count] + (hyper.noise + 1e-8) * np.eye(count))
    cross = every[count:, :count]
    mean, deviation = process.predict(slice(count, None))
    np.testing.assert_allclose(mean, cross @ inverse @ targets, rtol=1e-5, atol=1e-7)
    scale = targets @ inverse @ targets / count
    expected = np.sqrt(scale * np.maximum(1 - np.einsum("ij,jk,ik->i", cross, inverse, cross), 1e-12))
    np.testing.assert_allclose(deviation, expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 10), spread=st.floats(0.1, 3))
def test_a_trend_is_a_regression_beside_the_process(seed: int, count: int, spread: float) -> None:
    """Rasmussen and Williams, section 2.7: coefficients normal around a guess, written out with an inverse."""
    rng, space = np.random.default_rng(seed), make_space(TABLE)
    encoded = Encoded.of([space.sample(rng) for _ in range(count + 3)])
    targets, hyper = rng.normal(size=count), Hyperparameters.prior(encoded.ordered)
    trend = Trend(rng.normal(size=(count + 3, 2)), rng.normal(size=2), spread)
    every = GaussianProcess(encoded, rng.normal(size=count + 3), hyper).covariance(slice(None))
    every = every + spread**2 * trend.columns @ trend.columns.T
    inverse = np.linalg.inv(every[:count, :count] + (hyper.noise + 1e-8) * np.eye(count))
    cross, residual = every[count:, :count], targets - trend.columns[:count] @ trend.guess
    mean, deviation = GaussianProcess(encoded, targets, hyper, trend).predict(slice(count, None))
    np.testing.assert_allclose(
        mean, trend.columns[count:] @ trend.guess + cross @ inverse @ residual, rtol=1e-5, atol=1e-6
    )
    variance = np.diag(every)[count:] - np.einsum("ij,jk,ik->i", cross, inverse, cross)
    np.testing.assert_allclose(deviation**2, residual @ inverse @ residual / count * variance, rtol=1e-4, atol=1e-8)


def test_the_hyperparameters_find_what_matters() -> None:
    """Length scales are shorter, as a rule, for the decision that scores depend on."""
    rng = np.random.default_rng(0)
    table = {name: {"type": "float", "low": 0, "high": 1} for name in ("a", "b", "c")}
    space = make_space(table)
    some = [space.sample(rng) for _ in range(25)]
    targets = np.array([np.sin(9 * each.changes["a"]) for each in some])
    encoded = Encoded.of(some)
    draws = [walk(encoded, targets, Hyperparameters.prior(encoded.ordered), 60, rng) for _ in range(8)]
    lengths = np.median([draw.hyperparameters.lengths for draw in draws], axis=0)
    assert lengths[0] < 0.7 * min(lengths[1:])


@pytest.mark.parametrize("learning", ["gp", "nars"])
def test_a_model_beats_draws(learning: str) -> None:
    def best(name: str, seed: int) -> float:
        searcher, found = searcher_of(name, seed=seed), []
        for number in range(18):
            candidates = searcher.ask([number])
            told(searcher, candidates)
            found += [fitness_of(each) or -5.0 for each in candidates]
        return max(found)

    pairs = [(best(learning, seed), best("random", seed)) for seed in range(5)]
    assert np.mean([one for one, _ in pairs]) > np.mean([other for _, other in pairs]) + 0.1


@pytest.mark.parametrize("value", [0.0, 0.25, 0.5, 0.999])
def test_at_gives_the_share_of_a_domain_below(value: float) -> None:
    domain: Any = Float(low=1e-4, high=1.0, scale="log")
    assert domain.unit(domain.at(value)) == pytest.approx(value, abs=1e-9)


def test_losses_far_above_the_median_do_not_count_by_how_far() -> None:
    """A diverged run of 1e30 changes no proposal against one of 1e3."""

    def proposals(worst: float) -> list[Any]:
        searcher, rng = GaussianProcessSearcher(make_space(TABLE), 0), np.random.default_rng(1)
        for number in range(9):
            candidate = Candidate(number, searcher.space.sample(rng))
            loss = worst if number == 3 else 1 + number / 10
            searcher.tell([CandidateResult(candidate, -loss)])
        return [each.configuration.changes for each in searcher.ask([9, 10])]

    assert proposals(1e3) == proposals(1e30)
