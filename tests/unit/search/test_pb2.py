"""PB2 on a bandit whose best arm is known: what it learns, and what it proposes."""

import json
from typing import Any

import numpy as np

from search.pbt.engine import PopulationBasedTraining
from search.pbt.options import PBTOptions
from search.scheduling.driver import SegmentEnd, drive
from search.scheduling.scheduler import Problem
from search.scheduling.segments import Objective
from search.scheduling.work import Work
from search.space import make_space
from search.testing import MemoryStates

TABLE = {
    "kind": {"type": "choice", "values": ["a", "b", "c"]},
    "rate": {"type": "float", "low": 1e-4, "high": 1.0, "scale": "log"},
    "extra": {"type": "int", "low": 0, "high": 9, "when": {"kind": ["a", "b"]}},
}


def gain(changes: Any, step: int, drift: float) -> float:
    """Best at kind = b and rate = 0.01, later at other rates if there is a drift."""
    place = np.log10(changes["rate"]) / 4 + 1 - drift * step / 10
    return 1 - 4 * (place - 0.5) ** 2 - 0.5 * (changes["kind"] != "b") - 0.02 * changes.get("extra", 0)


def bandit(seed: int, explore: Any, steps: int = 14, drift: float = 0.0) -> PopulationBasedTraining:
    def train(work: Work, state: bytes | None) -> SegmentEnd:
        total = json.loads(state or b"0") + gain(work.changes, work.snapshot.step, drift)
        return SegmentEnd(json.dumps(total).encode(), work.until, {"total": total})

    section = {"name": "pbt", "space": TABLE, "population": 4, "interval": 1, "explore": explore}
    engine = PopulationBasedTraining(
        Problem(make_space(TABLE), Objective("total", "higher"), steps, seed), PBTOptions.model_validate(section)
    )
    drive(engine, MemoryStates(), train)
    return engine


def test_it_finds_the_best_arm() -> None:
    """Most proposals late in the search are near the optimum, categories and conditions included."""
    late = [row["new"] for row in bandit(0, "pb2", steps=20).drain() if row["action"] == "exploit"][-6:]
    near = [one for one in late if one["kind"] == "b" and 10**-2.7 < one["rate"] < 10**-1.3]
    assert len(near) >= 4, late


def test_it_follows_a_moving_optimum_better_than_random_exploration() -> None:
    scores = {
        explore: np.mean([bandit(seed, explore, steps=24, drift=0.1).best.score for seed in range(6)])
        for explore in ("pb2", "perturb", "resample")
    }
    assert scores["pb2"] > max(scores["perturb"], scores["resample"]) + 0.5, scores


def test_members_decided_on_together_do_not_all_take_the_same() -> None:
    rows = [row for row in bandit(1, {"name": "pb2", "window": 40}).drain() if row["action"] == "exploit"]
    configurations = {json.dumps(row["new"]) for row in rows}
    assert len(configurations) == len(rows) > 5
