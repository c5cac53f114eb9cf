"""Grid search: every combination of some values of each dimension."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from search.domains import Domain
from search.genome import Configuration
from search.searcher import Candidate, Searcher
from search.space import Space

POINTS = 3


class GridSearcher(Searcher):
    """Proposes the points of a grid in order.

    Args:
        space: what is searched.
        seed: not used.
        points: of each dimension of numbers; of others all values.
    """

    def __init__(self, space: Space, seed: int, points: int = POINTS) -> None:
        super().__init__(space, seed)
        self._points = points
        self._asked = 0
        self._grid = grid(space, points)

    def ask(self, numbers: Sequence[int]) -> list[Candidate]:
        """Return the next points, or fewer at the end of the grid."""
        points = list(islice(self._grid, len(numbers)))
        self._asked += len(points)
        return [Candidate(number, point) for number, point in zip(numbers, points, strict=False)]

    def state_dict(self) -> dict[str, Any]:
        """Return how many points were proposed."""
        return {"asked": self._asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the points that were proposed."""
        self._grid = grid(self.space, self._points)
        self._asked = len(list(islice(self._grid, state["asked"])))


def grid(space: Space, points: int) -> Iterator[Configuration]:
    """Yield every combination, the last decision changing first; decisions that depend on others are in their branches.

    Args:
        space: what is enumerated.
        points: of each dimension of numbers.
    """
    branch: list[int] | None = []
    while branch is not None:
        indices, counts = branch, list[int]()

        def decided(_: str, domain: Domain, indices: list[int] = indices, counts: list[int] = counts) -> Any:
            values = domain.grid(points)
            index = indices[len(counts)] if len(counts) < len(indices) else 0
            counts.append(len(values))
            return values[index]

        yield space.run(decided)
        branch = _next_branch([*indices, *[0] * (len(counts) - len(indices))], counts)


def _next_branch(indices: Sequence[int], counts: Sequence[int]) -> list[int] | None:
    """Return the indices of the next combination up to the last one that changes; None after the last combination."""
    for place in reversed(range(len(indices))):
        if indices[place] + 1 < counts[place]:
            return [*indices[:place], indices[place] + 1]
    return None
