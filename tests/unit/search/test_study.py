"""Searches that the user asks and tells: the decisions of a recipe's search, and states that go where they belong."""

import copy
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import search
from raytrain.errors import RecipeError, TrainingError
from raytrain.recipe import options_parameter
from raytrain.registry import resolve
from search import study
from search.chooser import Chooser
from search.options import SearchOptions
from search.scheduling.driver import SegmentEnd, drive
from search.scheduling.scheduler import Problem
from search.scheduling.segments import Objective
from search.scheduling.work import Work
from search.space import Space, make_space
from search.study import ASHA, PBT, Median, Random, Study, Trial
from search.tables import SEARCHES
from search.testing import MemoryStates

TABLE = {
    "rate": {"type": "float", "low": 1e-4, "high": 1.0, "scale": "log"},
    "width": {"type": "ordered", "values": [8, 16, 32]},
}
STEPS = 8
OPTIONS: dict[str, dict[str, Any]] = {
    "pbt": {"population": 6, "interval": 2, "optimizer_state": "reset"},
    "grid": {"points": 3},
    "asha": {"trials": 9, "interval": 2, "eta": 2},
    "hyperband": {"trials": 9, "interval": 2, "eta": 2},
    "median": {"trials": 9, "interval": 2, "least": 2},
    "extrapolation": {"trials": 9, "interval": 2, "least": 2},
}
METHODS = {each.name: each for each in vars(study).values() if isinstance(each, type) and hasattr(each, "name")}


def loss(params: Any, step: int) -> float:
    return abs(params["rate"] - 0.01) + params["width"] / 100 + 10 / (step + 1)


def make(name: str, seed: int = 3) -> Study:
    return METHODS[name](TABLE, steps=STEPS, seed=seed, **OPTIONS.get(name, {"trials": 9}))


def finish(asked: Study, trial: Trial) -> None:
    assert (trial.state or {"step": 0})["step"] == trial.step, "it goes on from where its state was"
    asked.tell(trial, loss(trial.params, trial.until), {"step": trial.until})


def run(asked: Study) -> list[Any]:
    while trial := asked.ask():
        finish(asked, trial)
    return asked.lineage


def test_each_method_of_a_recipe_has_its_class() -> None:
    assert METHODS.keys() == SEARCHES.keys()
    assert {each.__name__ for each in METHODS.values()} < set(search.__all__)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_study_decides_as_the_search_of_a_recipe(name: str) -> None:
    method = resolve(SEARCHES, name, "search.name")
    declared = options_parameter(method, SearchOptions)
    options = declared.model_validate({"name": name, "space": TABLE, **OPTIONS.get(name, {"trials": 9})})
    scheduler = method(Problem(make_space(TABLE), Objective("loss", "lower"), STEPS, 3, 3), options)

    def train(work: Work, state: bytes | None) -> SegmentEnd:
        return SegmentEnd(json.dumps(work.until).encode(), work.until, {"loss": loss(work.changes, work.until)})

    drive(scheduler, MemoryStates(), train)
    names_of_states = {"state", "parent_row"}
    plain = [{key: value for key, value in row.items() if key not in names_of_states} for row in scheduler.drain()]
    asked = make(name)
    assert [{key: value for key, value in row.items() if key not in names_of_states} for row in run(asked)] == plain
    assert (asked.best_value, asked.best_state) == (scheduler.best.score, {"step": scheduler.best.snapshot.step})
    assert asked.best_params == scheduler.best.segment.configuration.changes


@settings(max_examples=10)
@given(name=st.sampled_from(sorted(SEARCHES)), cut=st.integers(0, 20), order=st.randoms(use_true_random=False))
def test_trials_are_told_in_any_order_and_a_study_goes_on_from_its_state(
    name: str, cut: int, order: random.Random
) -> None:
    asked, under_way, told = make(name), [], 0
    while (trial := asked.ask()) or under_way:
        if trial:
            under_way.append(trial)
        if not trial or len(under_way) > 3:
            finish(asked, under_way.pop(order.randrange(len(under_way))))
            told += 1
            if told == cut:  # the process ends, and with it what was under way
                state, under_way = asked.state_dict(), []
                asked = make(name)
                asked.load_state_dict(state)
    assert asked._states.keys() <= {*asked._scheduler.digests()}, "of states only those are kept that are needed"
    assert asked.best_value < 2


def test_states_are_copies() -> None:
    asked = ASHA(TABLE, steps=4, interval=1, eta=2, trials=4)
    while trial := asked.ask():
        state = trial.state or [0]
        assert state == [trial.step]
        before = copy.deepcopy(state)
        state[0] = trial.until
        asked.tell(trial, float(trial.number), state)
        state[0] = before[0] = -1


def test_failures_are_repeated_and_what_is_not_finite_is_not() -> None:
    asked = Random(TABLE, trials=2, max_failures=1)
    trial = asked.ask()
    asked.tell(trial, None)
    again = asked.ask()
    assert (again.number, again.params, again.attempt != trial.attempt) == (trial.number, trial.params, True)
    asked.tell(again, float("nan"))
    with pytest.raises(TrainingError, match="no trial has a value yet"):
        _ = asked.best_value
    last = asked.ask()
    assert last.number == 1
    asked.tell(last, float("inf"))
    with pytest.raises(TrainingError, match=r"all 2 trials failed; the last one: .* is inf"):
        asked.ask()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match="PBT.populaton: no such field; did you mean population"):
        PBT(TABLE, steps=4, interval=2, populaton=4)
    with pytest.raises(RecipeError, match=r"Random.seconds: only a search recipe has it; leave it out"):
        Random(TABLE, seconds=3)
    with pytest.raises(RecipeError, match="Random.mode: expected min or max; got 'lower'"):
        Random(TABLE, mode="lower")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="search.interval: expected a divisor of steps = 5; got 2"):
        PBT(TABLE, steps=5, interval=2)
    with pytest.raises(RecipeError, match="search.interval: expected less than steps = 1; got 100"):
        Median(TABLE)
    with pytest.raises(RecipeError, match=r"search.first.0.depth: not searched; did you mean"):
        PBT(lambda choose: {"width": choose.int("dept", 1, 3)}, steps=4, interval=2, first=({"depth": 1},))
    asked = PBT(TABLE, steps=4, interval=2, population=4)
    trial = asked.ask()
    with pytest.raises(RecipeError, match="state: expected what training goes on from at step 2 of 4, such as model"):
        asked.tell(trial, 1.0)
    asked.tell(trial, 1.0, "state")
    with pytest.raises(RecipeError, match="trial: attempt 0.0.0 is not under way"):
        asked.tell(trial, 1.0, "state")


def test_a_space_is_a_table_a_function_or_a_space() -> None:
    def function(choose: Chooser) -> dict[str, Any]:
        return {"x": choose.int("x", 1, 3)}

    found = [
        Random(space, trials=2).ask().params
        for space in (function, Space(function), {"x": {"type": "int", "low": 1, "high": 3}})
    ]
    assert found[0] == found[1] == found[2]
