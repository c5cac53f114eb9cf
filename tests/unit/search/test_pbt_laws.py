"""Laws of the engine, for any order of arrivals and any failures."""

import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.journal.ancestry import ancestors, schedule
from search.pbt.engine import PopulationBasedTraining
from search.scheduling.driver import run_attempt
from search.scheduling.work import Done, Failed, Paused, Snapshot, Work, WorkOutcome
from search.testing import MemoryStates, toy_search, train_toy

FEW = settings(max_examples=25)
RULES = [
    {"exploit": "truncation", "population": 5},
    {"exploit": "tournament", "population": 4, "inherit": "weights"},
    {"exploit": "welch", "population": 4, "explore": "resample"},
    {"exploit": {"name": "mf-pbt", "frequencies": [1, 2]}, "population": 8},
]
rules = st.sampled_from(RULES)
orders = st.randoms(use_true_random=False)
modes = st.sampled_from([{}, {"synchronous": False}, {"synchronous": False, "step_matched": True}])


def search(**options: Any) -> PopulationBasedTraining:
    return toy_search(**{"steps": 40, "first": (), **options})


def run(
    engine: PopulationBasedTraining,
    order: random.Random | None = None,
    states: MemoryStates | None = None,
    outcome: Callable[[Work, WorkOutcome], WorkOutcome] = lambda work, outcome: outcome,
) -> list[dict[str, Any]]:
    """Train to the end, with all work at once, in a random order of arrivals; return the rows."""
    states = states or MemoryStates()
    under_way: list[Work] = []
    while works := [*under_way, *engine.ask(100)]:
        work = order.choice(works) if order else works[0]
        under_way = [other for other in works if other is not work]
        assert engine.tell(outcome(work, run_attempt(work, states, train_toy))) == ""
        needed = engine.digests()
        states.states = {digest: state for digest, state in states.states.items() if digest in needed}
        under_way = [other for other in under_way if other.attempt in engine.under_way]
    return engine.drain()


def plain(engine: PopulationBasedTraining) -> Any:
    return json.loads(json.dumps(engine.state_dict(), allow_nan=False))


@FEW
@given(rule=rules, seed=st.integers(0, 100), order=orders)
def test_the_order_of_arrivals_within_a_generation_changes_nothing(
    rule: dict[str, Any], seed: int, order: random.Random
) -> None:
    one, other = search(seed=seed, **rule), search(seed=seed, **rule)
    assert run(one) == run(other, order)
    assert plain(one) == plain(other)


@FEW
@given(rule=rules, seed=st.integers(0, 100), orders=st.tuples(orders, orders), kill=st.integers(0, 40))
def test_an_asynchronous_search_is_repeated_although_it_was_killed(
    rule: dict[str, Any], seed: int, orders: tuple[random.Random, random.Random], kill: int
) -> None:
    rows = run(search(seed=seed, **rule, synchronous=False), orders[0])
    engine, states, again, told = search(seed=seed, **rule, synchronous=False), MemoryStates(), [], set[str]()
    engine.follow(rows)
    for place in range(10_000):
        if place == kill:  # what came too early is lost with the process
            state, engine = plain(engine), search(seed=seed, **rule, synchronous=False)
            engine.load_state_dict(state)
            engine.follow(rows)
        engine.ask(100)
        if not (free := [work for work in engine.under_way.values() if work.attempt not in told]):
            break
        work = orders[1].choice(free)
        told.add(work.attempt)
        assert engine.tell(run_attempt(work, states, train_toy)) == ""
        again += engine.drain()
    assert [row for row in again if row["row"] >= rule["population"]] == rows[rule["population"] :]


def test_what_pb2_learns_does_not_depend_on_the_order_of_arrivals() -> None:
    rule = {"population": 4, "exploit": "truncation", "explore": "pb2", "steps": 60}
    one, other = search(**rule), search(**rule)
    assert run(one) == run(other, random.Random(0))
    assert plain(one) == plain(other)


@FEW
@given(rule=rules, mode=modes, seed=st.integers(0, 100), kills=st.sets(st.integers(1, 40), max_size=3))
def test_a_restart_between_any_two_outcomes_changes_nothing(
    rule: dict[str, Any], mode: dict[str, Any], seed: int, kills: set[int]
) -> None:
    expected = run(search(seed=seed, **rule, **mode))
    states, rows, engine = MemoryStates(), [], search(seed=seed, **rule, **mode)
    for told in range(10_000):
        if told in kills:
            state, engine = plain(engine), search(seed=seed, **rule, **mode)
            engine.load_state_dict(state)
        works = engine.ask(1)
        rows += engine.drain()
        if not works:
            break
        assert engine.tell(run_attempt(works[0], states, train_toy)) == ""
        rows += engine.drain()
    assert rows == expected


@FEW
@given(rule=rules, mode=modes, seed=st.integers(0, 100), order=orders)
def test_the_lineage_is_a_graph_without_cycles(
    rule: dict[str, Any], mode: dict[str, Any], seed: int, order: random.Random
) -> None:
    engine = search(seed=seed, **rule, **mode)
    rows = run(engine, order)
    assert [row["row"] for row in rows] == list(range(len(rows)))
    for row in rows:
        parent = row.get("parent_row")
        assert parent is None or (parent < row["row"] and "state" in rows[parent])
        assert (parent is None) == (row["action"] in ("start", "end"))
        if row["action"] == "exploit" and not rule.get("inherit"):
            assert rows[parent]["member"] == row["parent"] != row["member"]
    assert max(Counter(row["member"] for row in rows if "seed" in row).values()) <= 40 / 5, "no member trains longer"
    steps = [row["step"] for row in ancestors(rows, engine.best.segment.row)]
    assert steps == list(range(0, 40, 5))[: len(steps)]


@FEW
@given(rule=rules, seed=st.integers(0, 100), order=orders, matched=st.booleans())
def test_a_logged_order_of_arrivals_is_repeated(
    rule: dict[str, Any], seed: int, order: random.Random, matched: bool
) -> None:
    mode = {"synchronous": False, "step_matched": matched}
    rows = run(search(seed=seed, **rule, **mode), order)
    again = search(seed=seed, **rule, **mode)
    again.follow(rows)
    assert run(again, order) == rows


@FEW
@given(rule=rules, mode=modes, seed=st.integers(0, 100), order=orders)
def test_at_the_end_the_best_is_left(
    rule: dict[str, Any], mode: dict[str, Any], seed: int, order: random.Random
) -> None:
    """All runs of this file remove what is not needed after each outcome; here, what is left of it."""
    engine, states = search(seed=seed, **rule, **mode), MemoryStates()
    run(engine, order, states, lambda _, outcome: assert_done(outcome))
    assert states.states.keys() == {engine.best.snapshot.digest}


def assert_done(outcome: WorkOutcome) -> WorkOutcome:
    assert isinstance(outcome, Done), outcome
    return outcome


def test_step_matched_donors_are_at_the_step_of_the_child() -> None:
    exploits = {True: 0, False: 0}
    for seed in range(20):
        rows = run(search(seed=seed, **RULES[0], synchronous=False, step_matched=True, quorum=0.1), random.Random(seed))
        for row in rows:
            if row["action"] == "exploit":
                exploits[row["step"] == rows[row["ended"]]["step"] + 5] += 1
    assert exploits[True] > 50
    assert exploits[False] == 0


@FEW
@given(rule=rules, mode=modes, seed=st.integers(0, 50), order=orders, bad=st.lists(st.integers(0, 60), max_size=8))
def test_failures_end_no_search(
    rule: dict[str, Any], mode: dict[str, Any], seed: int, order: random.Random, bad: list[int]
) -> None:
    """Attempts fail by their row, for a cause that repeats or not; members are replaced, and the rest goes on."""
    engine = search(seed=seed, **rule, **mode)
    rows_that_fail = bad[: rule["population"] - 1]  # were they all of one generation, one member would be left
    causes = ["dead", "slow", "error", "stopped", "unreadable"]

    def outcome(work: Work, good: WorkOutcome) -> WorkOutcome:
        return Failed(work.attempt, causes[work.row % 5], "as told") if work.row in rows_that_fail else good

    rows = run(engine, order, outcome=outcome)
    assert {row["member"] for row in rows if row["action"] in ("end", "retire")} == set(range(rule["population"]))
    for row in rows:
        ended = row["ended"] if "failure" in row else None
        assert ended is None or ended in rows_that_fail
        again = row["action"] == "start" and row["generation"] > 0  # asynchronous, and nobody has reported
        assert ("failure" in row) == (again or row["action"] in ("replace", "fallback", "retire"))


def test_the_schedule_of_the_winner_gives_its_score_again() -> None:
    engine = search(seed=4, **RULES[0])
    rows, best = run(engine), engine.best
    phases = schedule(rows, best.segment.row)
    ends = [*(phase.from_step for phase in phases[1:]), best.snapshot.step]
    state = None
    for phase, end in zip(phases, ends, strict=True):
        work = Work("", 0, 0, Snapshot("", phase.from_step), end, phase.changes, phase.seed)
        trained = train_toy(work, state)
        state = trained.state
    assert len(phases) == 3
    assert trained.metrics["q"] == best.score


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"q": float("nan")}, "the metric q is nan"),
        ({"q": float("inf")}, "the metric q is inf"),
        ({"q": "0.9"}, "the metric q is no number: '0.9'"),
        ({"q": True}, "the metric q is no number: True"),
        ({"qq": 1.0}, "the metric 'q' was not measured; did you mean qq? known: qq"),
    ],
)
def test_scores_that_are_no_numbers_are_failures(metrics: dict[str, Any], message: str) -> None:
    engine = search(population=2, exploit="tournament", max_failures=0)
    one, other = engine.ask(2)
    engine.tell(Done(one.attempt, Snapshot("a", 5), {"q": 1.0}))
    engine.tell(Done(other.attempt, Snapshot("b", 5), metrics))
    row = engine.drain()[-1]
    assert row["action"] == "replace"
    assert row["failure"]["message"] == message
    assert row["parent"] == 0


def test_outcomes_of_earlier_attempts_and_duplicates_are_refused() -> None:
    engine = search(population=2, exploit="tournament")
    one, other = engine.ask(2)
    assert engine.tell(Failed(one.attempt, "dead", "")) == ""
    again = engine.ask(2)
    assert [work.row for work in again] == [one.row]
    refused = f"attempt {one.attempt} is not under way: it was reported before, or given up and handed out again"
    assert engine.tell(Done(one.attempt, Snapshot("a", 5), {"q": 1.0})) == refused
    restarted = search(population=2, exploit="tournament")
    restarted.load_state_dict(plain(engine))
    assert [work.row for work in restarted.ask(5)] == [0, 1]
    for work in (again[0], other):
        assert restarted.tell(Done(work.attempt, Snapshot("a", 5), {"q": 1.0})).startswith(f"attempt {work.attempt} ")


def test_a_paused_segment_goes_on_from_where_it_stopped() -> None:
    engine = search(population=2, exploit="tournament")
    work = engine.ask(1)[0]
    assert engine.tell(Paused(work.attempt, Snapshot("a", 3))) == ""
    assert "a" in engine.digests()
    rest = {work.row: work for work in engine.ask(5)}[work.row]
    assert (rest.snapshot, rest.until) == (Snapshot("a", 3), 5)


def test_crashes_of_a_member_are_bounded() -> None:
    engine = search(population=2, exploit="tournament", max_failures=2)
    attempts = 0
    while works := engine.ask(5):
        attempts += len([work for work in works if work.member == 0])
        for work in works:
            good = Done(work.attempt, Snapshot(f"s{work.row}", work.until), {"q": 1.0})
            engine.tell(good if work.member else Failed(work.attempt, "dead", "gone"))
    rows = [row for row in engine.drain() if row["member"] == 0]
    assert [row["action"] for row in rows] == ["start", "replace", "replace", "retire"]
    assert attempts == 9, "three segments, three attempts each"
