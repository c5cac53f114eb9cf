"""Population based training on the toy problem of the paper, and laws of its decisions."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytrain.errors import TrainingError
from search.pbt.engine import PopulationBasedTraining
from search.rng import keyed_seed
from search.scheduling.driver import drive
from search.scheduling.scheduler import SearchError
from search.scheduling.work import Done, Failed, Paused, Snapshot
from search.testing import HALVES, MemoryStates, toy_search, train_toy


def best_score(**options: Any) -> float:
    search = toy_search(**options)
    drive(search, MemoryStates(), train_toy)
    return search.best.score


@pytest.fixture
def clipped_noise(workplace: Path) -> str:
    """The explore rule of the replications of the paper's Figure 2: noise, clipped at the bounds."""
    (workplace / "mine.py").write_text(
        "def explore(member, population, rng):\n"
        "    return {path: min(1.0, max(0.0, h + 0.1 * rng.standard_normal())) for path, h in member.values.items()}\n"
    )
    return "mine:explore"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"exploit": "none", "explore": "none"}, 0.3897),
        ({"explore": "none", "inherit": "weights"}, 1.1715),
        ({"explore": "none", "inherit": "both"}, 0.3897),
    ],
    ids=["grid", "exploit weights", "exploit weights and hyperparameters"],
)
def test_the_toy_problem_without_explore(options: dict[str, Any], expected: float) -> None:
    assert best_score(**options) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("exploit", "expected", "tolerance"), [("none", 1.107, 0.02), ("tournament", 1.191, 0.005)], ids=["explore", "pbt"]
)
def test_the_toy_problem_of_the_paper(exploit: str, expected: float, tolerance: float, clipped_noise: str) -> None:
    scores = [best_score(seed=seed, exploit=exploit, explore=clipped_noise) for seed in range(200)]
    assert np.mean(scores) == pytest.approx(expected, abs=tolerance)


def test_multiplication_cannot_leave_zero(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert best_score(noise=0) == pytest.approx(0.3897, abs=1e-4), "as without explore"
    assert [record.getMessage() for record in caplog.records] == [
        "h0 is 0 in member 1, and no factor leads away from 0; give the dimension a step, which is added, or set "
        "search.explore = 'resample'"
    ]


def told(engine: PopulationBasedTraining, scores: Sequence[float], digests: str = "abcdefgh") -> list[dict[str, Any]]:
    """Report a score for each member of a generation, and return the rows that follow."""
    works = engine.ask(len(scores))
    engine.drain()
    for work in works:
        snapshot = Snapshot(f"{digests[work.member]}{work.until}", work.until)
        assert engine.tell(Done(work.attempt, snapshot, {"q": scores[work.member]})) == ""
    return engine.drain()


@pytest.mark.parametrize(
    ("inherit", "state", "values_from"), [("weights", "b5", 0), ("hyperparameters", "a5", 1), ("both", "b5", 1)]
)
def test_what_a_member_inherits(inherit: str, state: str, values_from: int) -> None:
    engine = toy_search(inherit=inherit, explore="none")
    loser, winner = told(engine, [0.1, 0.9])
    assert (loser["action"], loser["state"], loser["values_from"]) == ("exploit", state, values_from)
    assert loser["new"] == HALVES[values_from]
    assert loser["old"] == HALVES[0]
    assert loser["statistic"] == {"opponent": 1}
    assert (winner["action"], winner["state"], winner["new"]) == ("continue", "b5", HALVES[1])
    assert loser["seed"] != winner["seed"], "the child goes on with its own order of the data"


@pytest.mark.parametrize(("inherit", "resets"), [("both", True), ("hyperparameters", False)])
def test_the_optimizer_state_of_a_donor_is_reset_once(inherit: str, resets: bool) -> None:
    """With the donor's weights; not again where the segment goes on after a pause."""
    engine = toy_search(explore="none", inherit=inherit, optimizer_state="reset")
    loser, winner = told(engine, [0.1, 0.9])
    assert loser.get("reset_optimizer", False) == resets
    assert "reset_optimizer" not in winner
    (child, _) = engine.ask(2)
    assert child.reset_optimizer == resets
    engine.tell(Paused(child.attempt, Snapshot("a7", 7)))
    (rest,) = engine.ask(2)
    assert (rest.row, rest.snapshot.step, rest.reset_optimizer) == (child.row, 7, False)


def test_a_member_that_is_never_replaced_is_an_ordinary_training() -> None:
    rows = told(toy_search(), [0.1, 0.9])
    more = told(toy_search(), [0.1, 0.9])
    assert rows == more
    assert {row["seed"] for row in rows} == {keyed_seed(0, "data", 0), keyed_seed(0, "data", 1)}


def test_nobody_exploits_before_the_burn_in_is_over() -> None:
    engine = toy_search(burn_in=15)
    actions = [told(engine, [0.1, 0.9])[0]["action"] for _ in range(3)]
    assert actions == ["continue", "continue", "exploit"]


def test_a_quorum_does_not_wait_for_ever() -> None:
    engine = toy_search(population=4, exploit="truncation", first=(), quorum=0.5)
    works = engine.ask(4)
    assert engine.tell(Done(works[0].attempt, Snapshot("a", 5), {"q": 0.5})) == ""
    assert not engine.expire(), "one of four is no quorum"
    assert engine.tell(Done(works[2].attempt, Snapshot("c", 5), {"q": 0.7})) == ""
    assert engine.expire()
    rows = {row["member"]: row for row in engine.drain()[4:]}
    for slow in (1, 3):
        assert rows[slow]["action"] == "replace"
        assert rows[slow]["state"] == "c", "the best quarter of those that reported"
        assert rows[slow]["failure"]["cause"] == "slow"
        late = engine.tell(Done(works[slow].attempt, Snapshot("late", 5), {"q": 9.0}))
        assert late.startswith(f"attempt {works[slow].attempt} is not under way")
    assert not engine.expire()
    assert [work.until for work in engine.ask(9)] == [10] * 4


def test_in_asynchronous_mode_nobody_exploits_before_a_quorum_has_reported() -> None:
    engine = toy_search(population=4, exploit="tournament", first=(), synchronous=False, quorum=0.75)
    works = engine.ask(4)
    rows = []
    for work, score in zip(works, [0.9, 0.1, 0.2, 0.3], strict=True):
        engine.drain()
        engine.tell(Done(work.attempt, Snapshot(f"s{work.member}", 5), {"q": score}))
        rows += engine.drain()
    assert rows[1]["statistic"] == {}
    assert "opponent" in rows[2]["statistic"]
    assert not engine.expire()


def test_an_asynchronous_child_goes_on_from_the_step_of_its_donor() -> None:
    engine = toy_search(synchronous=False, explore="none")
    slow, fast = engine.ask(2)
    for until in (5, 10, 15):
        engine.tell(Done(fast.attempt, Snapshot(f"f{until}", until), {"q": 0.9}))
        [fast] = engine.ask(1)
    engine.tell(Done(slow.attempt, Snapshot("s5", 5), {"q": 0.1}))
    [slow] = engine.ask(1)
    assert (slow.snapshot, slow.until) == (Snapshot("f15", 15), 20)


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_the_best_is_kept_whatever_comes_later(better: Any) -> None:
    engine = toy_search(better=better, exploit="none", explore="none", steps=15)
    for scores in ([0.5, 0.5], [0.9, 0.1], [0.5, 0.5]):
        told(engine, scores)
    assert engine.best.snapshot.digest == ("a10" if better == "higher" else "b10")
    assert engine.digests() == {engine.best.snapshot.digest}


def test_guesses_come_first_and_what_they_leave_out_is_drawn() -> None:
    engine = toy_search(population=3, first=({"h1": 0.25},))
    changes = [work.changes for work in engine.ask(3)]
    assert changes[0]["h1"] == 0.25
    assert 0 < changes[0]["h0"] < 1
    assert len({json.dumps(dict(each)) for each in changes}) == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return {'h0': 7}", "returned 7 for h0, which is between 0 and 1"),
        (
            "return {'h2': 1}",
            "returned a value for 'h2', which is no hyperparameter of the member; known: h0, h1",
        ),
        ("return 3", "returned 3; expected a mapping of paths to values"),
        ("return 1 / 0", "raised ZeroDivisionError: division by zero (mine.py, line 2)"),
    ],
)
def test_explore_functions_that_fail(body: str, message: str, workplace: Path) -> None:
    (workplace / "mine.py").write_text(f"def explore(member, population, rng):\n    {body}\n")
    with pytest.raises(TrainingError) as error:
        told(toy_search(explore="mine:explore"), [0.1, 0.9])
    assert str(error.value).startswith(f"search.explore: mine:explore {message}")


def test_a_search_ends_when_all_members_fail() -> None:
    engine = toy_search()
    one, other = engine.ask(2)
    engine.tell(Failed(one.attempt, "stopped", "the loss is nan"))
    with pytest.raises(SearchError) as error:
        engine.tell(Failed(other.attempt, "stopped", "the loss is inf"))
    assert str(error.value) == "all 2 members failed; member 1 at last (stopped): the loss is inf"
