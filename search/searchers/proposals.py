"""Proposals that were not asked before."""

import json
from collections.abc import Collection, Iterable, Iterator
from itertools import islice

import numpy as np

from search.chooser import Configuration
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
