"""Every optimizer that goes by elements or norms, against its paper's recursion written anew in numpy."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from raytrain.optim.arguments import optimizer_options
from raytrain.optim.ema import averages_weights
from raytrain.optim.optimizers import make_optimizer
from raytrain.optim.options import OPTIMIZERS
from raytrain.registry import resolve

Array = NDArray[np.float64]
Recursion = Callable[[Array], Iterator[Array]]
"""Where a run starts -> the position after each gradient that is sent."""

LR, DECAY = 0.03, 0.1
B1, B2, EPS = 0.9, 0.99, 1e-8
STEPS = 12


def moments(gradient: Array, m: Array, v: Array, b1: float = B1, b2: float = B2) -> tuple[Array, Array]:
    return b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2


def sgd(x: Array) -> Iterator[Array]:
    buffer = None
    while True:
        gradient = (yield x) + DECAY * x
        buffer = gradient if buffer is None else B1 * buffer + gradient
        x = x - LR * buffer


def adam(x: Array, decoupled: bool = False) -> Iterator[Array]:
    m, v, t = np.zeros_like(x), np.zeros_like(x), 0
    while True:
        gradient = yield x
        t += 1
        if decoupled:
            x = x - LR * DECAY * x
        else:
            gradient = gradient + DECAY * x
        m, v = moments(gradient, m, v)
        x = x - LR * (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)


def adamw(x: Array) -> Iterator[Array]:
    return adam(x, decoupled=True)


def nadam(x: Array, decoupled: bool = False) -> Iterator[Array]:
    """Dozat 2016, algorithm 2, with the momentum schedule of its section 3 and psi = 0.004."""
    m, v, t, product = np.zeros_like(x), np.zeros_like(x), 0, 1.0
    while True:
        gradient = yield x
        t += 1
        if decoupled:
            x = x - LR * DECAY * x
        else:
            gradient = gradient + DECAY * x
        mu, after = (B1 * (1 - 0.5 * 0.96 ** (0.004 * step)) for step in (t, t + 1))
        product *= mu
        m, v = moments(gradient, m, v)
        ahead = after * m / (1 - product * after) + (1 - mu) * gradient / (1 - product)
        x = x - LR * ahead / (np.sqrt(v / (1 - B2**t)) + EPS)


def nadamw(x: Array) -> Iterator[Array]:
    return nadam(x, decoupled=True)


def radam(x: Array) -> Iterator[Array]:
    """Liu et al. 2020, algorithm 2; as in its authors' code, from an SMA of 5 instead of 4."""
    m, v, t = np.zeros_like(x), np.zeros_like(x), 0
    longest = 2 / (1 - B2) - 1
    while True:
        gradient = yield x
        t += 1
        gradient = gradient + DECAY * x
        m, v = moments(gradient, m, v)
        length = longest - 2 * t * B2**t / (1 - B2**t)
        step = m / (1 - B1**t)
        if length > 5:
            rate = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            step = step * math.sqrt(rate) * math.sqrt(1 - B2**t) / (np.sqrt(v) + EPS)
        x = x - LR * step


def adagrad(x: Array) -> Iterator[Array]:
    total = np.zeros_like(x)
    while True:
        gradient = (yield x) + DECAY * x
        total = total + gradient**2
        x = x - LR * gradient / (np.sqrt(total) + 1e-10)


def rmsprop(x: Array) -> Iterator[Array]:
    v = np.zeros_like(x)
    while True:
        gradient = (yield x) + DECAY * x
        v = 0.99 * v + 0.01 * gradient**2
        x = x - LR * gradient / (np.sqrt(v) + EPS)


def adabelief(x: Array) -> Iterator[Array]:
    """Zhuang et al. 2020, algorithm 2, with decoupled decay; eps is added into s and to its root."""
    m, s, t = np.zeros_like(x), np.zeros_like(x), 0
    while True:
        gradient = yield x
        t += 1
        x = x - LR * DECAY * x
        m = B1 * m + (1 - B1) * gradient
        s = B2 * s + (1 - B2) * (gradient - m) ** 2 + EPS
        x = x - LR * (m / (1 - B1**t)) / (np.sqrt(s / (1 - B2**t)) + EPS)


def adan(x: Array) -> Iterator[Array]:
    """Xie et al. 2022, algorithm 1, with its betas as shares kept: 0.98, 0.92, 0.99, and Adam's bias correction."""
    b1, b2, b3 = 0.98, 0.92, 0.99
    m, d, n, t, before = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x), 0, None
    while True:
        gradient = yield x
        t += 1
        change = gradient - (gradient if before is None else before)
        before = gradient
        m = b1 * m + (1 - b1) * gradient
        d = b2 * d + (1 - b2) * change
        n = b3 * n + (1 - b3) * (gradient + b2 * change) ** 2
        rate = LR / (np.sqrt(n / (1 - b3**t)) + EPS)
        x = (x - rate * (m / (1 - b1**t) + b2 * d / (1 - b2**t))) / (1 + LR * DECAY)


def lamb(x: Array) -> Iterator[Array]:
    """You et al. 2020, algorithm 2."""
    m, v, t = np.zeros_like(x), np.zeros_like(x), 0
    while True:
        gradient = yield x
        t += 1
        m, v = moments(gradient, m, v)
        step = (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS) + DECAY * x
        x = x - LR * np.linalg.norm(x) / np.linalg.norm(step) * step


def lion(x: Array) -> Iterator[Array]:
    """Chen et al. 2023, algorithm 2."""
    m = np.zeros_like(x)
    while True:
        gradient = yield x
        x = x - LR * (np.sign(B1 * m + (1 - B1) * gradient) + DECAY * x)
        m = B2 * m + (1 - B2) * gradient


def prodigy(x: Array) -> Iterator[Array]:
    """Mishchenko and Defazio 2023, algorithm 4; factors that r and s share are left out."""
    start, d, kept = x, 0.01, math.sqrt(B2)
    m, v, s, r = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x), 0.0
    while True:
        gradient = yield x
        m = B1 * m + (1 - B1) * d * gradient
        v = B2 * v + (1 - B2) * d**2 * gradient**2
        r = kept * r + d**2 * float(np.sum(gradient * (start - x)))
        s = kept * s + d**2 * gradient
        old, d = d, max(d, r / np.abs(s).sum())
        x = x - old * DECAY * x
        x = x - old * m / (np.sqrt(v) + d * EPS)


def schedulefree(x: Array) -> Iterator[Array]:
    """Defazio et al. 2024, algorithm 1; yields y, where gradients are taken."""
    y, z, v, t = x, x, np.zeros_like(x), 0
    while True:
        gradient = yield y
        t += 1
        v = B2 * v + (1 - B2) * gradient**2
        z = z - LR * (gradient / (np.sqrt(v / (1 - B2**t)) + EPS) + DECAY * y)
        x = (1 - 1 / t) * x + z / t
        y = (1 - B1) * z + B1 * x


def sgdsai(x: Array) -> Iterator[Array]:
    """Xu et al. 2024, algorithm 1; the momentum starts as the first gradient, as in its authors' code."""
    ratio, m = None, None
    while True:
        gradient = yield x
        if ratio is None or m is None:
            ratio, m = np.linalg.norm(gradient) / (gradient.std(ddof=1) + EPS), gradient
        m = B1 * m + (1 - B1) * gradient
        x = x - LR * DECAY * x - LR * ratio * m


BETAS = {"betas": (B1, B2), "eps": EPS}
PAPERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (sgd, {"momentum": B1}),
    "adam": (adam, BETAS),
    "adamw": (adamw, BETAS),
    "nadam": (nadam, BETAS),
    "nadamw": (nadamw, BETAS),
    "radam": (radam, BETAS),
    "adagrad": (adagrad, {}),
    "rmsprop": (rmsprop, {}),
    "adabelief": (adabelief, BETAS),
    "adan": (adan, {"betas": (0.98, 0.92, 0.99), "eps": EPS}),
    "lamb": (lamb, BETAS),
    "lion": (lion, {"betas": (B1, B2)}),
    "prodigy": (prodigy, {**BETAS, "lr": 1.0, "d0": 0.01}),
    "schedulefree": (schedulefree, BETAS),
    "sgdsai": (sgdsai, {"momentum": B1, "eps": EPS}),
}
OWN_TESTS = {"muon", "galore", "fira"}


def test_each_is_checked_somewhere() -> None:
    assert PAPERS.keys() | OWN_TESTS == OPTIMIZERS.keys()


@pytest.mark.parametrize("name", PAPERS)
def test_it_takes_the_steps_of_its_paper(name: str) -> None:
    paper, changes = PAPERS[name]
    draw = np.random.default_rng(len(name))
    module = nn.Linear(5, 4, bias=False, dtype=torch.float64)
    constructor = resolve(OPTIMIZERS, name, "optimizer.name")
    options = optimizer_options(name)(name=name, **{"lr": LR, "weight_decay": DECAY, **changes})
    optimizer = make_optimizer(constructor, options, module)
    recursion = paper(module.weight.detach().numpy().copy())
    next(recursion)
    for step in range(STEPS):
        gradient = draw.normal(0.3, 1, (4, 5))
        module.weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        np.testing.assert_allclose(
            module.weight.detach().numpy(), recursion.send(gradient), rtol=1e-6, atol=1e-9, err_msg=f"step {step + 1}"
        )
    assert averages_weights(optimizer) == (name == "schedulefree")
