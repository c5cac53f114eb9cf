"""Monte Carlo tree search over the decisions of a space."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from scipy.stats import rankdata

from search.chooser import Configuration
from search.domains import Bool, Choice, Domain
from search.searchers.model_based import ModelBasedSearcher
from search.surrogate.encoding import GRID

EXPLORATION = 0.15
"""c of the upper confidence bound; the paper's 1 is for deeper trees than 200 results can fill."""
WALKS = 20
"""Ways down the tree to candidates that were asked already or are over the limits, before one is drawn."""
TREE_DRAWS = 100

Branch = tuple[str, int, int]
"""(path, first cell, end): the values of a decision, cut into cells, from the first one up to the end."""


@dataclass(slots=True)
class TreeNode:
    """A place in the tree: some branches, one after the other.

    Attributes:
        visits: results that took these branches first.
        total: of their rewards.
        children: next branch -> node.
    """

    visits: int = 0
    total: float = 0.0
    children: dict[Branch, "TreeNode"] = field(default_factory=dict)

    def add(self, branches: Iterable[Branch], reward: float) -> None:
        """Count a result here and at the end of each branch below."""
        node = self
        node.visits, node.total = node.visits + 1, node.total + reward
        for branch in branches:
            node = node.children.setdefault(branch, TreeNode())
            node.visits, node.total = node.visits + 1, node.total + reward

    def bound(self, branch: Branch) -> float:
        """Return the upper confidence bound of a branch; one without results comes first."""
        child = self.children.get(branch)
        if child is None:
            return math.inf
        return child.total / child.visits + EXPLORATION * math.sqrt(2 * math.log(self.visits) / child.visits)


class MCTSSearcher(ModelBasedSearcher):
    """Goes down a tree of decisions, each time to the child of the highest upper confidence bound (UCT).

    With N results below a node, and n below a child with a mean reward of Q, the bound is Q + c sqrt(2 ln N / n).
    Values with an order are halved until one is left, so that neighbours share what is known of them; of others each is
    a child. Below the tree all is drawn. The reward of a result is its rank among all, from 0 for the worst to 1;
    candidates that failed or are under way have 0.

    Source: Negrinho and Gordon 2017, DeepArchitect (MCTS with bisection).
    """

    def _choose(self, rng: np.random.Generator) -> Configuration | None:
        root = self._tree()

        def walks() -> Iterator[Configuration]:
            for _ in range(WALKS):
                walk = _Walk(root, rng)
                configuration = self.space.run(walk)
                if self.space.allows(configuration):
                    yield configuration
                root.add(walk.branches, 0.0)  # so that the next one goes elsewhere

        draws = (self.space.sample(rng) for _ in range(TREE_DRAWS))
        return next(self._unasked(chain(walks(), draws)), None)

    def _tree(self) -> TreeNode:
        """Return the tree of all candidates."""
        root, rewards = TreeNode(), self._rewards()
        for number, configuration in self._configurations.items():
            root.add(_branches(configuration), rewards.get(number, 0.0))
        return root

    def _rewards(self) -> dict[int, float]:
        told = {number: fitness for number, fitness in self._fitness.items() if fitness is not None}
        ranks = rankdata(list(told.values())) if told else []
        return {number: (float(rank) - 0.5) / len(told) for number, rank in zip(told, ranks, strict=True)}


class _Walk:
    """The policy that goes down a tree, and draws where it has ended.

    Attributes:
        branches: taken so far.
    """

    def __init__(self, root: TreeNode, rng: np.random.Generator) -> None:
        self.branches: list[Branch] = []
        self._node: TreeNode | None = root
        self._rng = rng

    def __call__(self, path: str, domain: Domain) -> Any:
        first, end = 0, _cells(domain)
        while end - first > 1:
            first, end = self._step([(path, *part) for part in _parts(domain, first, end)])
        if domain.is_listed:
            return domain.extremes()[first]
        return domain.at((first + self._rng.random()) / _cells(domain))

    def _step(self, branches: Sequence[Branch]) -> tuple[int, int]:
        node, ties = self._node, self._rng.random(len(branches))
        bounds = [node.bound(branch) if node else math.inf for branch in branches]
        chosen = max(range(len(branches)), key=lambda place: (bounds[place], ties[place]))
        self.branches.append(branches[chosen])
        self._node = node.children.get(branches[chosen]) if node else None
        return branches[chosen][1:]


def _branches(configuration: Configuration) -> Iterator[Branch]:
    """Yield the branches that lead to a configuration."""
    for decision in configuration.genome.decisions:
        cell, first, end = _cell(decision.domain, decision.value), 0, _cells(decision.domain)
        while end - first > 1:
            parts = _parts(decision.domain, first, end)
            first, end = next(part for part in parts if part[0] <= cell < part[1])
            yield decision.path, first, end


def _parts(domain: Domain, first: int, end: int) -> list[tuple[int, int]]:
    """Return the children of some cells: halves, or without an order each cell."""
    if isinstance(domain, Choice | Bool):
        return [(cell, cell + 1) for cell in range(first, end)]
    middle = (first + end) // 2
    return [(first, middle), (middle, end)]


def _cells(domain: Domain) -> int:
    """Return the number of cells: of values, or of equal parts of a scale."""
    return int(domain.count) if domain.is_listed else int(min(domain.count, GRID))


def _cell(domain: Domain, value: Any) -> int:
    """Return the cell that a value is in."""
    if domain.is_listed:
        return domain.index(value)
    return min(int((domain.unit(value) or 0.0) * _cells(domain)), _cells(domain) - 1)
