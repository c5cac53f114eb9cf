"""A search in a loop of one's own, without Ray: python own_loop.py."""

from search.chooser import Chooser
from search.searcher import CandidateResult
from search.searchers.evolution import EvolutionSearcher
from search.space import Space


def space(choose: Chooser) -> dict[str, float]:
    """Return hyperparameters; loops and conditions are those of Python."""
    momentum = choose.float("momentum", 0.0, 0.99) if choose.bool("heavy_ball") else 0.0
    return {"lr": choose.float("lr", 1e-3, 1.0, log=True), "momentum": momentum}


def descend(lr: float, momentum: float) -> float:
    """Return the loss (theta - 3)^2 after ten steps of gradient descent with momentum."""
    theta = velocity = 0.0
    for _ in range(10):
        velocity = momentum * velocity - lr * 2 * (theta - 3)
        theta += velocity
    return (theta - 3) ** 2


searcher = EvolutionSearcher(Space(space), seed=0)
scores: list[tuple[float, dict[str, float]]] = []
for number in range(60):
    [candidate] = searcher.ask([number])
    changes = dict(candidate.configuration.changes)
    loss = descend(**changes)
    searcher.tell([CandidateResult(candidate, fitness=-loss)])
    scores.append((loss, changes))

best, found = min(scores, key=lambda score: score[0])
print(f"loss {best:.2e} with", ", ".join(f"{name} = {value:.3f}" for name, value in found.items()))
