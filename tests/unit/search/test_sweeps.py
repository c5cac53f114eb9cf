"""Sweeps: budgets, promotion and stopping, and laws for any order of arrivals."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raytrain.errors import RecipeError
from raytrain.recipe import options_parameter
from raytrain.registry import resolve
from search.chooser import Chooser
from search.forecasts import forecast_summary, forecasts
from search.options import SearchOptions
from search.scheduling.driver import SegmentEnd, run_attempt
from search.scheduling.scheduler import Problem, Scheduler, SearchError
from search.scheduling.segments import Objective
from search.scheduling.work import Done, Failed, Work, WorkOutcome
from search.searchers.grid import grid_points
from search.space import Space, make_space
from search.sweep.asha import SuccessiveHalving
from search.sweep.extrapolation import CurveExtrapolation
from search.sweep.median import MedianStopping
from search.sweep.options import ExtrapolationOptions
from search.sweep.searches import extrapolation
from search.tables import SEARCHES
from search.testing import MemoryStates

FEW = settings(max_examples=20)
TABLE = {
    "kind": {"type": "choice", "values": ["a", "b"]},
    "rate": {"type": "float", "low": 1e-4, "high": 1.0, "scale": "log"},
    "beta": {"type": "float", "low": 0.5, "high": 0.999, "scale": "one-minus", "when": {"kind": "b"}},
    "width": {"type": "ordered", "values": [8, 16, 32]},
    "depth": {"type": "int", "low": 1, "high": 4},
}
SWEEPS = [
    {"name": "grid", "points": 2},
    {"name": "random", "trials": 12},
    {"name": "asha", "trials": 13, "interval": 3, "eta": 2},
    {"name": "asha", "trials": 9, "interval": 5, "searcher": "tpe"},
    {"name": "hyperband", "trials": 19, "interval": 4, "eta": 2},
    {"name": "median", "trials": 9, "interval": 4, "least": 2},
    {"name": "extrapolation", "trials": 9, "interval": 3, "least": 3, "chance": 0.3},
    {"name": "tpe", "trials": 13},
]
sweeps = st.sampled_from(SWEEPS)
orders = st.randoms(use_true_random=False)


def loss(changes: Any, step: int) -> float:
    distance = (math.log10(changes["rate"]) + 2) ** 2 + (changes["kind"] == "a") + abs(changes["depth"] - 2)
    return distance + 10 / (step + 1) + changes["width"] / 100


def train(work: Work, state: bytes | None) -> SegmentEnd:
    assert work.snapshot.step == (json.loads(state) if state else 0), "a paused trial goes on from its state"
    return SegmentEnd(json.dumps(work.until).encode(), work.until, {"loss": loss(work.changes, work.until)})


def sweep(seed: int = 0, steps: int = 20, **section: Any) -> Scheduler:
    factory = resolve(SEARCHES, section["name"], "search.name")
    options = options_parameter(factory, SearchOptions).model_validate({"space": TABLE, **section})
    return factory(Problem(make_space(TABLE), Objective("loss", "lower"), steps, seed), options)


def run(
    engine: Scheduler,
    order: random.Random | None = None,
    slots: int = 3,
    outcome: Callable[[Work, WorkOutcome], WorkOutcome] = lambda work, outcome: outcome,
) -> list[dict[str, Any]]:
    states: MemoryStates = MemoryStates()
    under_way: list[Work] = []
    while works := [*under_way, *engine.ask(slots - len(under_way))]:
        work = order.choice(works) if order else works[0]
        under_way = [other for other in works if other is not work]
        assert engine.tell(outcome(work, run_attempt(work, states, train))) == ""
        needed = engine.digests()
        states.states = {digest: state for digest, state in states.states.items() if digest in needed}
    return engine.drain()


@FEW
@given(section=sweeps, seed=st.integers(0, 50), order=orders)
def test_a_logged_order_of_arrivals_is_repeated(section: dict[str, Any], seed: int, order: random.Random) -> None:
    rows = run(sweep(seed, **section), order)
    again = sweep(seed, **section)
    again.follow(rows)
    assert run(again, slots=2) == rows


@FEW
@given(section=sweeps, seed=st.integers(0, 50), kills=st.sets(st.integers(1, 20), max_size=3))
def test_a_restart_between_any_two_outcomes_changes_nothing(
    section: dict[str, Any], seed: int, kills: set[int]
) -> None:
    expected = run(sweep(seed, **section), slots=1)
    engine, states, rows = sweep(seed, **section), MemoryStates(), []
    for told in range(1000):
        if told in kills:
            state = json.loads(json.dumps(engine.state_dict(), allow_nan=False))
            engine = sweep(seed, **section)
            engine.load_state_dict(state)
        works = engine.ask(1)
        if not works:
            break
        engine.tell(run_attempt(works[0], states, train))
        rows += engine.drain()
    assert rows == expected


@FEW
@given(section=sweeps, seed=st.integers(0, 50), order=orders, bad=st.sets(st.integers(0, 30), max_size=8))
def test_trials_that_fail_are_counted_and_the_rest_goes_on(
    section: dict[str, Any], seed: int, order: random.Random, bad: set[int]
) -> None:
    engine = sweep(seed, **section)

    def outcome(work: Work, good: WorkOutcome) -> WorkOutcome:
        return Failed(work.attempt, "stopped", "the loss is nan") if work.row in bad else good

    rows = run(engine, order, outcome=outcome)
    begun = {row["member"] for row in rows if row["action"] == "start"}
    over = Counter(row["member"] for row in rows if row["action"] in ("end", "stop", "pause", "fail"))
    assert over.keys() == begun
    assert {row["ended"] for row in rows if row["action"] == "fail"} <= bad


def test_a_grid_has_every_combination_once() -> None:
    points = list(grid_points(make_space(TABLE), 3))
    assert len(points) == (1 + 3) * 3 * 3 * 3, "beta is active under one of two kinds"
    assert len({json.dumps(point.genome.values()) for point in points}) == len(points)
    rows = run(sweep(name="grid", points=3, trials=5))
    assert [row["new"] for row in rows if row["action"] == "start"] == [dict(point.changes) for point in points[:5]]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_a_grid_of_nested_choices_is_a_product(counts: list[int]) -> None:
    def program(choose: Chooser) -> dict[str, Any]:
        return {str(place): choose.one_of(str(place), list(range(count))) for place, count in enumerate(counts)}

    points = [tuple(point.changes.values()) for point in grid_points(Space(program), 2)]
    assert sorted(set(points)) == points
    assert len(points) == math.prod(counts)


@FEW
@given(seed=st.integers(0, 50), order=orders, eta=st.sampled_from([2, 3]), trials=st.integers(1, 20))
def test_halving_promotes_the_best_of_each_rung(seed: int, order: random.Random, eta: int, trials: int) -> None:
    rows = run(sweep(seed, name="asha", trials=trials, interval=2, eta=eta), order)
    rungs = [2, *(2 * eta**level for level in range(1, 5) if 2 * eta**level < 20), 20]
    began = {
        row["row"]: rungs[0] if row["action"] == "start" else rungs[rungs.index(row["step"]) + 1]
        for row in rows
        if "seed" in row
    }
    scores: dict[int, dict[int, float]] = {rung: {} for rung in rungs}
    for row in rows:
        if row["action"] in ("pause", "stop", "end"):
            assert began[row["ended"]] == row["step"]
            scores[row["step"]][row["member"]] = row["score"]
    for below, rung in zip(rungs, rungs[1:], strict=False):
        room = len(scores[below]) // eta
        assert len(scores[rung]) >= room, "nothing that could be promoted is left"
        best = sorted(scores[below], key=lambda trial: (scores[below][trial], trial))[:room]
        assert set(best) <= scores[rung].keys()
    assert sum(row["action"] == "start" for row in rows) == trials


def test_halving_promotes_from_the_highest_rung_first() -> None:
    pruner = SuccessiveHalving(steps=8, interval=2, eta=2, trials=16)
    assert pruner.first_step(0) == 2
    for trial in range(4):
        assert pruner.judge(trial, 2, trial, {}) is None
    assert [pruner.promote() for _ in range(3)] == [(3, 4), (2, 4), None]
    for trial in (2, 3):
        pruner.judge(trial, 4, trial, {})
    for trial in (4, 5):
        pruner.judge(trial, 2, -trial, {})
    assert [pruner.promote() for _ in range(3)] == [(3, 8), (1, 4), None]
    assert pruner.promotable() == {0, 4, 5, 2}


@FEW
@given(seed=st.integers(0, 50), order=orders, eta=st.sampled_from([2, 3]), trials=st.integers(1, 60))
@example(seed=0, order=random.Random(0), eta=2, trials=60)
@example(seed=0, order=random.Random(0), eta=3, trials=60)
def test_the_brackets_of_hyperband_are_halvings_that_begin_later(
    seed: int, order: random.Random, eta: int, trials: int
) -> None:
    rows = run(sweep(seed, name="hyperband", trials=trials, interval=2, eta=eta), order)
    rungs = [2, *(2 * eta**level for level in range(1, 5) if 2 * eta**level < 20), 20]
    began: dict[int, int] = {}  # trial -> the lowest rung of its bracket
    for row in rows:
        if "score" in row:
            began.setdefault(row["member"], row["step"])
    assert len(began) == trials
    assert set(began.values()) <= set(rungs)
    for first in set(began.values()):
        bracket = [trial for trial, until in began.items() if until == first]
        reached = {
            rung: {row["member"]: row["score"] for row in rows if row.get("step") == rung and "score" in row}
            for rung in rungs
        }
        for below, rung in zip(rungs, rungs[1:], strict=False):
            here = [trial for trial in bracket if trial in reached[below]]
            room = len(here) // eta if below >= first else 0
            best = sorted(here, key=lambda trial: (reached[below][trial], trial))[:room]
            assert set(best) <= reached[rung].keys(), "nothing that could be promoted is left"
    if trials >= 60:
        spent = dict.fromkeys(rungs, 0)
        for row in rows:
            spent[began[row["member"]]] += taken(row)
        assert max(spent.values()) <= 3 * min(spent.values()), "brackets cost about the same"


def test_halving_takes_fewer_steps_and_finds_the_same_best() -> None:
    full, halved = sweep(name="random", trials=30), sweep(name="asha", trials=30, interval=2)
    steps = [sum(step for step in map(taken, run(engine))) for engine in (full, halved)]
    assert steps[0] == 30 * 20
    assert steps[1] < steps[0] / 2
    assert halved.best.segment.configuration == full.best.segment.configuration


def taken(row: dict[str, Any]) -> int:
    """The steps of a trial that has come to its end, or paused there for good."""
    return (
        row["step"] if row["action"] in ("end", "stop", "pause") else -row["step"] if row["action"] == "promote" else 0
    )


def test_the_median_rule_is_that_of_the_paper() -> None:
    rows = run(sweep(name="median", trials=20, interval=4, least=3), slots=1)
    curves: dict[int, list[float]] = {}
    for row in rows:
        if "score" not in row:
            continue
        own = curves.setdefault(row["member"], [])
        own.append(-row["score"])
        means = [
            fmean(curve[: len(own)])
            for trial, curve in curves.items()
            if trial != row["member"] and len(curve) >= len(own)
        ]
        stopped = len(means) >= 3 and max(own) < median(means)
        assert (row["action"] == "stop") == (stopped and len(own) < 5)
    assert Counter(row["action"] for row in rows)["stop"] > 3


def test_a_trial_is_judged_by_its_best_score_against_means() -> None:
    pruner = MedianStopping(steps=12, interval=4, least=2)
    for trial, scores in enumerate([[0.5, 0.1], [0.4, 0.2]]):
        assert [pruner.judge(trial, step, score, {}) for step, score in zip((4, 8), scores, strict=True)] == [8, 12]
    assert pruner.judge(2, 4, 0.5, {}) == 8, "above the median of 0.5 and 0.4"
    assert pruner.judge(2, 8, 0.0, {}) == 12, "its best is 0.5, and the means are 0.3"
    assert pruner.judge(3, 4, 0.3, {}) is None
    assert pruner.judge(2, 12, 0.0, {}) is None, "the end"


def test_extrapolation_stops_what_would_not_have_won() -> None:
    full, stopped = sweep(name="random", trials=20), sweep(name="extrapolation", trials=20, interval=2)
    run(full, slots=1)
    rows = run(stopped, slots=1)
    assert stopped.best.segment.configuration == full.best.segment.configuration
    assert sum(map(taken, rows)) < 0.6 * 20 * 20
    found = forecasts(rows)
    assert all((each.chance < 0.05) == each.stopped for each in found)
    assert all(each.step == 8 for each in found if each.end is not None), "after four scores, and a third of 20 steps"
    assert "trials stopped early" in forecast_summary(found)


def test_a_law_of_annealing_needs_a_schedule() -> None:
    options = ExtrapolationOptions.model_validate({"name": "extrapolation", "space": TABLE, "law": "annealing"})
    problem = Problem(make_space(TABLE), Objective("loss", "lower"), 20)
    with pytest.raises(RecipeError, match="search.law: expected power, as only a training recipe has a schedule"):
        extrapolation(problem, options)


def test_a_curve_is_extrapolated_in_units_of_the_score() -> None:
    """A trial has to beat every other one, of which higher may be better."""
    rising = {step: 1 - 1 / (1 + step) for step in (2, 4, 6, 8)}
    for better, sign in (("lower", -1), ("higher", 1)):
        options = ExtrapolationOptions.model_validate({"name": "extrapolation", "space": {}, "interval": 2, "grace": 0})
        pruner = CurveExtrapolation(100, options, Objective("score", better), lambda _: [1.0] * 100)
        pruner.judge(0, 2, 0.95, {})
        nexts = [pruner.judge(1, step, fitness, {}) for step, fitness in rising.items()]
        assert nexts == [4, 6, 8, 10]
        predicted = pruner.remark()["predicted"]
        assert predicted["low"] < predicted["score"] < predicted["high"]
        assert predicted["score"] == pytest.approx(sign * 1.0, abs=0.1)
        pruner.judge(2, 2, 3.0, {})
        assert pruner.judge(1, 10, 1 - 1 / 11, {}) is None, "the best one is out of reach"
        assert pruner.remark()["predicted"]["chance"] < 0.05


def test_tpe_learns() -> None:
    best = {name: [] for name in ("tpe", "random")}
    for name, scores in best.items():
        for seed in range(3):
            engine = sweep(seed, name=name, trials=40)
            run(engine, slots=1)
            scores.append(engine.best.score)
    assert np.mean(best["tpe"]) < np.mean(best["random"]) - 0.1, best


def test_tpe_reads_all_kinds_of_dimensions() -> None:
    rows = run(sweep(name="tpe", trials=25))
    seen = [row["new"] for row in rows if row["action"] == "start"]
    domains = make_space(TABLE).domains
    for changes in seen:
        assert ("beta" in changes) == (changes["kind"] == "b")
        assert all(domains[path].contains(value) for path, value in changes.items())


@pytest.mark.parametrize("name", ["random", "asha", "tpe"])
def test_guesses_come_first(name: str) -> None:
    guess = {"kind": "b", "rate": 0.01, "depth": 2}
    works = sweep(name=name, trials=4, first=[guess], **({"interval": 5} if name == "asha" else {})).ask(2)
    assert guess.items() <= works[0].changes.items()
    assert not guess.items() <= works[1].changes.items()


@pytest.mark.parametrize(
    "section", [{"name": "random"}, {"name": "median", "interval": 4}, {"name": "asha", "interval": 4}]
)
def test_no_segment_begins_after_the_budget_of_steps(section: dict[str, Any]) -> None:
    engine = sweep(total_steps=50, **section)
    rows = run(engine, slots=1)
    done = 0
    for row in rows:
        if "score" in row:
            done += 4 if section["name"] == "median" else taken(row)
        if row["action"] in ("start", "continue", "promote"):
            assert done < 50 + 20
    assert 50 <= sum(map(taken, rows)) < 50 + 20


def test_a_sweep_whose_trials_all_fail_ends_with_the_reason() -> None:
    engine = sweep(name="random", trials=2, max_failures=0)
    for _ in range(2):
        [work] = engine.ask(1)
        engine.tell(Failed(work.attempt, "dead", "gone"))
    with pytest.raises(SearchError) as error:
        engine.ask(1)
    assert str(error.value) == "all 2 trials failed; the last one: trial 1 (dead): gone"


def test_a_done_outcome_of_the_wrong_step_is_a_failure() -> None:
    engine = sweep(name="random", trials=1, max_failures=0)
    [work] = engine.ask(1)
    states = MemoryStates()
    done = run_attempt(work, states, train)
    assert isinstance(done, Done)
    engine.tell(Done(work.attempt, type(done.snapshot)(done.snapshot.digest, 7), done.metrics))
    assert engine.drain()[-1]["failure"]["message"] == "expected training to step 20; it ended at step 7"
