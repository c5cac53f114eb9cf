"""Searchers: what proposes configurations, asked and told.

A searcher is asked for any number of candidates while others are outstanding, and told results in any order. Its
`state_dict` holds what later proposals depend on.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search.chooser import Configuration
from search.space import Space


@dataclass(frozen=True, slots=True)
class Candidate:
    """A configuration to evaluate.

    Attributes:
        number: by which its results are told; unique in a search.
        configuration: the hyperparameters.
    """

    number: int
    configuration: Configuration


@dataclass(frozen=True, slots=True)
class CandidateResult:
    """The result of a candidate.

    Attributes:
        candidate: of this searcher, of another one or of the user.
        fitness: higher is better; None: it failed. A later result of the same candidate replaces this one.
    """

    candidate: Candidate
    fitness: float | None


class Searcher(ABC):
    """A method of search.

    Args:
        space: what is searched.
        seed: of all draws.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space = space
        self.seed = seed

    @abstractmethod
    def ask(self, numbers: Sequence[int]) -> list[Candidate]:
        """Return a candidate for each number, or fewer where the space is spent."""

    def tell(self, results: Sequence[CandidateResult]) -> None:  # noqa: B027 - not all learn
        """Learn from results."""

    def remark(self) -> dict[str, Any]:
        """Return what the lineage says of the last proposal beside its values, as plain data."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return all that proposals depend on, as plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - not all have a state
        """Go on from the state of an earlier searcher."""
