"""Population based training on the toy problem of the paper, and laws of its decisions."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.driver import drive
from search.testing import MemoryStates, toy_search, train_toy


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
