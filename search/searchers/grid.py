"""Grid search: every combination of some values of each dimension."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from search.chooser import Configuration
from search.domains import Domain
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
        self._grid = self._points_within_limits()

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
        self._grid = self._points_within_limits()
        self._asked = len(list(islice(self._grid, state["asked"])))

    def _points_within_limits(self) -> Iterator[Configuration]:
        return filter(self.space.allows, grid_points(self.space, self._points))


def grid_points(space: Space, points: int) -> Iterator[Configuration]:
    """Yield every combination, the last decision changing first; conditions have branches of their own.

    Args:
        space: what is enumerated.
        points: of each dimension of numbers.
    """
    indices: list[int] | None = []
    while indices is not None:
        branch = _Branch(indices, points)
        yield space.run(branch)
        indices = branch.next()


class _Branch:
    """The policy of one combination: the values at some indices, then the first one of each further decision.

    Args:
        indices: of the first decisions.
        points: of each dimension of numbers.
    """

    def __init__(self, indices: Sequence[int], points: int) -> None:
        self._given = indices
        self._points = points
        self._places: list[tuple[int, int]] = []

    def __call__(self, _: str, domain: Domain) -> Any:
        """Return the value of the next decision."""
        values, place = domain.grid(self._points), len(self._places)
        index = self._given[place] if place < len(self._given) else 0
        self._places.append((index, len(values)))
        return values[index]

    def next(self) -> list[int] | None:
        """Return the indices of the next combination, up to the last one that changes; None after the last."""
        indices = [index for index, _ in self._places]
        for place in reversed(range(len(indices))):
            index, count = self._places[place]
            if index + 1 < count:
                return [*indices[:place], index + 1]
        return None
