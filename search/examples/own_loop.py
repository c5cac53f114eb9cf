"""A search in a loop of one's own, without Ray: python own_loop.py."""

from search import Evolution
from search.chooser import Chooser


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


study = Evolution(space, trials=60)
while trial := study.ask():
    study.tell(trial, descend(**trial.params))

found = ", ".join(f"{name} = {value:.3f}" for name, value in study.best_params.items())
print(f"loss {study.best_value:.2e} with {found}")
