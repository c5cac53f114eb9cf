"""What tests import: states in memory, and the toy problem of the paper."""

import hashlib
import json
from typing import Any, Literal

from raytrain.errors import CheckpointError
from search.pbt.engine import PopulationBasedTraining
from search.pbt.options import PBTOptions
from search.scheduling.driver import SegmentEnd
from search.scheduling.scheduler import Problem
from search.scheduling.segments import Objective
from search.scheduling.work import Work
from search.space import make_space

HALVES: tuple[dict[str, Any], ...] = ({"h0": 1.0, "h1": 0.0}, {"h0": 0.0, "h1": 1.0})
"""The two members of the toy problem; each sees one half of it."""


class MemoryStates:
    """A store of states in memory; a test can damage them."""

    def __init__(self) -> None:
        self.states: dict[str, bytes] = {}

    def put(self, state: bytes) -> str:
        """Store a state and return its name."""
        digest = hashlib.sha256(state).hexdigest()
        self.states[digest] = state
        return digest

    def get(self, digest: str) -> bytes:
        """Return a state."""
        state = self.states.get(digest, b"")
        if hashlib.sha256(state).hexdigest() != digest:
            raise CheckpointError(f"{digest}: its contents changed since it was written")
        return state


def train_toy(work: Work, state: bytes | None) -> SegmentEnd:
    """Ascend the surrogate Q'(theta) = 1.2 - h0 theta0^2 - h1 theta1^2; the score is Q, which has h = 1.

    Source: Jaderberg et al. 2017, Figure 2; theta starts at (0.9, 0.9), rate 0.01.
    """
    theta = [0.9, 0.9] if state is None else json.loads(state)
    rates = (work.changes["h0"], work.changes["h1"])
    for _ in range(work.snapshot.step, work.until):
        theta = [value - 0.01 * 2 * rate * value for value, rate in zip(theta, rates, strict=True)]
    score = 1.2 - theta[0] ** 2 - theta[1] ** 2
    return SegmentEnd(json.dumps(theta).encode(), work.until, {"q": score})


def toy_search(
    seed: int = 0,
    steps: int = 200,
    noise: float = 0.1,
    better: Literal["lower", "higher"] = "higher",
    bounds: tuple[float, float] = (0, 1),
    **options: Any,
) -> PopulationBasedTraining:
    """Return population based training of the toy problem, by default with its two members.

    Args:
        seed: of all draws.
        steps: of each member.
        noise: standard deviation of what explore adds; 0: explore multiplies.
        better: which scores are.
        bounds: of both hyperparameters.
        options: of the `[search]` section.
    """
    dimension = {"type": "float", "low": bounds[0], "high": bounds[1], "step": noise}
    table = {"h0": dimension, "h1": dimension}
    section = {"name": "pbt", "population": 2, "interval": 5, "exploit": "tournament", "first": HALVES, **options}
    problem = Problem(make_space(table), Objective("q", better), steps, seed)
    return PopulationBasedTraining(problem, PBTOptions.model_validate({"space": table, **section}))
