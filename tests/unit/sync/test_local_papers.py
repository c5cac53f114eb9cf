"""Local updates against their papers' recursions, written in NumPy, and against the numbers of another implementation.

The recursions know nothing of our classes: each has all replicas at once, whose steps are those of SGD on quadratics
that differ, with weights that differ, at a rate that may fall as a cosine. Our replicas are threads, made by name.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from raytrain.recipe import options_parameter
from raytrain.registry import resolve
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.options import SYNCHRONISERS
from raytrain.testing import ThreadGroup, ThreadTransport

Floats = NDArray[np.float64]
GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "torchft_diloco.json").read_text())
START = np.array([0.0, 1.0, 2.0])


class Setting:
    """What a recursion and our replicas have in common.

    Attributes:
        weights: of the replicas.
        every: steps in a round.
        rounds: how many.
        rates: the learning rate of each step.
        targets: of each step and replica; the gradient is the distance from it.
    """

    def __init__(self, weights: list[int], every: int, rounds: int, cosine: bool, seed: int) -> None:
        self.weights, self.every, self.rounds = weights, every, rounds
        steps = every * rounds
        self.rates = [0.3 * (0.5 + 0.5 * math.cos(math.pi * step / steps)) if cosine else 0.3 for step in range(steps)]
        self.targets = np.random.default_rng(seed).normal(size=(steps, len(weights), len(START)))

    def end(self, point: Floats, rank: int, turn: int) -> Floats:
        """Return where a replica ends a round that it begins at a point."""
        for step in range(turn * self.every, (turn + 1) * self.every):
            point = point - self.rates[step] * (point - self.targets[step, rank])
        return point

    def mean(self, points: list[Floats]) -> Floats:
        """Return the weighted mean over replicas."""
        total: Floats = np.average(np.stack(points), axis=0, weights=self.weights)
        return total

    def mean_end(self, point: Floats, turn: int) -> Floats:
        """Return the mean of where all replicas end a round that they begin at one point."""
        return self.mean([self.end(point, rank, turn) for rank in range(len(self.weights))])


def local_sgd(setting: Setting) -> list[Floats]:
    """Stich 2019: replicas go on from their mean."""
    point = START
    for turn in range(setting.rounds):
        point = setting.mean_end(point, turn)
    return [point] * len(setting.weights)


def slowmo(setting: Setting, alpha: float, beta: float) -> list[Floats]:
    """Wang et al. 2020, algorithm 1: u <- beta u + (x - mean) / gamma, x <- x - alpha gamma u."""
    point, momentum = START, np.zeros(3)
    for turn in range(setting.rounds):
        gamma = setting.rates[(turn + 1) * setting.every - 1]
        momentum = beta * momentum + (point - setting.mean_end(point, turn)) / gamma
        point = point - alpha * gamma * momentum
    return [point] * len(setting.weights)


def diloco(setting: Setting, alpha: float, beta: float) -> list[Floats]:
    """Douillard et al. 2023: Nesterov's momentum, as torch's SGD has it, on the outer gradient x - mean."""
    point, momentum = START, np.zeros(3)
    for turn in range(setting.rounds):
        gradient = point - setting.mean_end(point, turn)
        momentum = beta * momentum + gradient
        point = point - alpha * (gradient + beta * momentum)
    return [point] * len(setting.weights)


def cocod(setting: Setting) -> list[Floats]:
    """Shen et al. 2019: x_i <- mean_j x_j + what replica i did while that was averaged."""
    points = [START] * len(setting.weights)
    for turn in range(setting.rounds):
        mean = setting.mean(points)
        points = [mean + setting.end(point, rank, turn) - point for rank, point in enumerate(points)]
    return points


def co2(setting: Setting, alpha: float, beta: float, clip: float, penalty: str) -> list[Floats]:
    """Sun et al. 2024: x_{t+1} = x_t - alpha m_t, m_t = clip(beta m_{t-1} + Delta_{t-1} / Lambda_t).

    Delta_t = x_t - the mean of where replicas end round t. Lambda_t is 1, a constant, 1 + |x_t - x_{t-1}| /
    |Delta_{t-1}|, or max(1, 3 alpha c / (1 - beta)) with c = <x_{t-1} - x_{t-2}, Delta_{t-1} - Delta_{t-2}> / |x_{t-1}
    - x_{t-2}|^2 between 0 and 1, of which each new one counts 0.3 and the mean of those before 0.7.
    """
    points, differences, momentum, curvature = [START], [], np.zeros(3), None
    for turn in range(setting.rounds):
        now = points[-1]
        if differences:
            late = differences[-1]
            if len(points) > 2:
                step = points[-2] - points[-3]
                if step @ step:
                    slope = step @ (differences[-1] - differences[-2]) / (step @ step)
                    found = min(max(slope, 0.0), 1.0)
                    curvature = found if curvature is None else 0.7 * curvature + 0.3 * found
            gap = np.linalg.norm(now - points[-2]) if len(points) > 1 else 0.0
            divisor = {
                "none": 1.0,
                "constant": 2 * alpha / (1 - beta),
                "gap-aware": 1 + gap / np.linalg.norm(late),
                "secant": max(1.0, 3 * alpha * (1.0 if curvature is None else curvature) / (1 - beta)),
            }[penalty]
            momentum = beta * momentum + late / divisor
            momentum = np.clip(momentum, -clip, clip) if clip else momentum
        differences.append(now - setting.mean_end(now, turn))
        points.append(now - alpha * momentum)
    return [points[-1]] * len(setting.weights)


def ours(name: str, setting: Setting, **options: Any) -> list[Floats]:
    """Return where our replicas are after the last round."""
    factory = resolve(SYNCHRONISERS, name, "sync.name")
    chosen = options_parameter(factory)(name=name, every=setting.every, **options)

    def replica(transport: ThreadTransport) -> Floats:
        module = nn.Linear(1, 3, bias=False).double()
        module.weight.data.copy_(torch.from_numpy(START)[:, None])
        sync = factory(ExactAverager(transport), chosen)
        sync.attach(module)
        for rate, targets in zip(setting.rates, setting.targets, strict=True):
            sync.set_weight(float(setting.weights[transport.rank]))
            sync.before_step(0.0, stop=False)
            with torch.no_grad():
                module.weight -= rate * (module.weight - torch.from_numpy(targets[transport.rank])[:, None])
            sync.after_step(rate)
        place: Floats = module.weight.detach()[:, 0].numpy().copy()
        return place

    return ThreadGroup(len(setting.weights)).run(replica)


SETTINGS = st.builds(
    Setting,
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, 99),
)
MOMENTUM = {"alpha": st.sampled_from([0.7, 1.0]), "beta": st.sampled_from([0.0, 0.2, 0.5])}
METHODS: list[tuple[str, Callable[..., list[Floats]], dict[str, Any]]] = [
    ("local-sgd", local_sgd, {}),
    ("slowmo", slowmo, MOMENTUM),
    ("diloco", diloco, MOMENTUM),
    ("cocod", cocod, {}),
    *(
        ("co2", co2, {**MOMENTUM, "clip": st.sampled_from([0.0, 0.05, 1.0]), "penalty": st.just(penalty)})
        for penalty in ("none", "constant", "gap-aware", "secant")
    ),
]
CALLED = {"alpha": "outer_lr", "beta": "outer_momentum"}


@pytest.mark.parametrize(("name", "recursion", "options"), METHODS)
@settings(max_examples=25, deadline=None)
@given(setting=SETTINGS, data=st.data())
def test_replicas_are_where_the_paper_has_them(
    name: str, recursion: Callable[..., list[Floats]], options: dict[str, Any], setting: Setting, data: st.DataObject
) -> None:
    drawn = {key: data.draw(values) for key, values in options.items()}
    expected = recursion(setting, **drawn)
    found = ours(name, setting, **{CALLED.get(key, key): value for key, value in drawn.items()})
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "rounds"), [("layers.0.weight", [3, 6, 6]), ("layers.1.weight", [6, 6, 6])], ids=["first", "second"]
)
def test_diloco_makes_the_numbers_of_torchfts_regression_test(name: str, rounds: list[int]) -> None:
    """To the bit. A parameter whose first round is shorter is trained in two runs: there is no momentum to lose."""
    factory = resolve(SYNCHRONISERS, "diloco", "sync.name")
    expected, found = GOLDEN[name], [GOLDEN[name][0]]
    for every in rounds:
        options = options_parameter(factory)(name="diloco", every=every, outer_lr=2.0, outer_momentum=0.0)

        def replica(transport: ThreadTransport, options: Any = options, begun: float = found[-1]) -> list[float]:
            module = nn.Linear(1, 1, bias=False)
            nn.init.constant_(module.weight, begun)
            optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
            sync = factory(ExactAverager(transport), options)
            sync.attach(module)
            places = []
            for _ in range(options.every):
                module.weight.grad = torch.full((1, 1), 2.0)
                sync.set_weight(1.0)
                sync.before_step(0.0, stop=False)
                optimizer.step()
                sync.after_step(1.0)
                places.append(module.weight.item())
            return places

        first, second = ThreadGroup(2).run(replica)
        assert first == second
        found += first
    assert found[: len(expected)] == expected
