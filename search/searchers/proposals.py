"""Proposals that were not asked before."""

import json
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from search.chooser import Configuration
from search.searcher import Candidate, Searcher
from search.searchers.grid import grid_points
from search.space import Space
from search.surrogate.encoding import GRID

MAX_ENUMERATED = 100_000


def key_of(configuration: Configuration) -> str:
    """Return what two equal configurations have in common."""
    return json.dumps(configuration.genome.values(), sort_keys=True)


def unasked(space: Space, asked: Collection[str], drawn: Iterable[Configuration]) -> Iterator[Configuration]:
    """Yield the configurations that were not asked yet, each once.

    Where all of them were asked, the space is gone through; it is spent where that yields nothing.

    Args:
        space: what is searched.
        asked: keys of what was asked.
        drawn: configurations of the space.
    """
    seen = set(asked)
    for configuration in drawn:
        if (key := key_of(configuration)) not in seen:
            seen.add(key)
            yield configuration
    if len(seen) == len(asked):
        every = islice(grid_points(space, GRID), MAX_ENUMERATED)
        new = (point for point in every if key_of(point) not in seen and space.allows(point))
        yield from islice(new, 1)


def new_draw(space: Space, asked: Collection[str], rng: np.random.Generator) -> Configuration | None:
    """Return a draw within the limits of a space that was not asked yet; None where the space is spent."""
    return next(unasked(space, asked, [space.sample(rng)]), None)


class SequentialSearcher(Searcher):
    """Proposes one candidate after another, each with all proposals before it known."""

    def ask(self, numbers: Sequence[int]) -> list[Candidate]:
        """Return a proposal for each number, or fewer where the space is spent."""
        candidates = []
        for number in numbers:
            configuration = self._propose(number)
            if configuration is None:
                break
            candidates.append(Candidate(number, configuration))
            self._record(candidates[-1])
        return candidates

    @abstractmethod
    def _propose(self, number: int) -> Configuration | None:
        """Return a configuration that was not proposed yet, or None where the space is spent."""

    @abstractmethod
    def _record(self, candidate: Candidate) -> None:
        """Keep what was proposed."""


class NonRepeatingSearcher(SequentialSearcher):
    """Keeps the keys of what it proposed, and no results.

    Args:
        space: what is searched.
        seed: of all draws.
    """

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(space, seed)
        self._asked: dict[str, None] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what was proposed."""
        return {"asked": list(self._asked)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after what was proposed."""
        self._asked = dict.fromkeys(state["asked"])

    def _record(self, candidate: Candidate) -> None:
        """Keep its key."""
        self._asked[key_of(candidate.configuration)] = None
