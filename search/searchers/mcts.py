"""Monte Carlo tree search over the decisions of a space."""

from dataclasses import dataclass, field

from search.searcher import Searcher

EXPLORATION = 0.3
"""c of UCT."""
SHARED = 10.0
"""k of RAVE: visits of a node at which the mean of its own results counts as much as that of all with its choice."""
ROLLOUTS = 20
"""Walks down the tree in search of a candidate that was not asked, before one is drawn."""

Choice = tuple[str, int, int]
"""(path, first cell, end): of the values of a decision, cut into cells, those from the first up to the end."""


@dataclass(slots=True)
class Node:
    """Some choices, one after the other.

    Attributes:
        visits: how many results begin with them.
        total: the sum of their rewards.
        children: next choice -> its node.
    """

    visits: int = 0
    total: float = 0.0
    children: dict[Choice, "Node"] = field(default_factory=dict)


class MCTSSearcher(Searcher):
    """Walks down a tree of choices, each time to the child with the highest upper confidence bound.

    The values of a decision with an order are halved until one is left, so that neighbours share what is learned of
    them; of the others each is a child. With Q the mean reward below a child, visited n of its parent's N times, and R
    the mean of all results with its choice, wherever in the tree:

        beta = sqrt(k / (3 N + k)),  score = (1 - beta) Q + beta R + c sqrt(ln N / n)

    A reward is the rank of a result among all, from 0 to 1; failures and candidates under way have 0.

    Source: Negrinho and Gordon 2017, DeepArchitect, section 5 (MCTS with bisection); Gelly and Silver 2011, Monte-Carlo
    Tree Search and Rapid Action Value Estimation, section 4.
    """
