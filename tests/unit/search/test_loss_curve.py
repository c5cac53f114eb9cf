"""Loss curves: what is predicted of their ends, against curves whose ends are known."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm

from raytrain.training.recipe import Schedule
from search.surrogate.encoding import FloatArray
from search.sweep import loss_curve
from search.sweep.loss_curve import Annealing, predict_end

STEPS = 400
SCHEDULES = ("constant", "linear", "cosine", "wsd")
FEW = settings(max_examples=12, deadline=None)


def schedule_of(name: str, warmup: int = 0) -> Annealing:
    factor = Schedule(name=name, warmup=warmup).factor(STEPS)
    return Annealing.of([factor(step) for step in range(STEPS)])


def law(schedule: Annealing, lowest: float, fall: float, alpha: float, gain: float) -> FloatArray:
    """The curve after each step."""
    annealed = schedule.annealed / max(schedule.annealed[-1], 1e-12)
    return lowest + fall * (schedule.areas / schedule.areas[9]) ** -alpha - gain * annealed


def drawn(seed: int, noise: float) -> tuple[Annealing, FloatArray, FloatArray]:
    """A schedule, steps that are measured, and the losses there, the last one at the end."""
    rng = np.random.default_rng(seed)
    schedule = schedule_of(SCHEDULES[seed % 4], int(rng.choice([0, 20])))
    lowest, fall, alpha, gain = rng.uniform([1.5, 0.5, 0.2, 0.0], [2.5, 2.0, 1.2, 0.2])
    steps = np.arange(10, STEPS + 1, 10)
    return schedule, steps, law(schedule, lowest, fall, alpha, gain)[steps - 1] + noise * rng.normal(size=len(steps))


def predicted(schedule: Annealing, steps: Sequence[int] | FloatArray, losses: FloatArray) -> loss_curve.Prediction:
    return predict_end(schedule, [int(step) for step in steps], losses.tolist())


@FEW
@given(st.integers(0, 10_000), st.sampled_from(SCHEDULES), st.sampled_from([4, 2]))
def test_a_curve_without_noise_is_continued(seed: int, name: str, part: int) -> None:
    """At a constant rate to within 5 % of what it has fallen so far; what a decay will gain shows only as it goes."""
    rng = np.random.default_rng(seed)
    schedule, steps = schedule_of(name), np.arange(10, STEPS // part + 1, 10)
    fall, alpha = rng.uniform(0.5, 2), rng.uniform(0.3, 1.2)
    fallen = float(np.ptp(law(schedule, 2.0, fall, alpha, 0.0)[steps - 1]))
    losses = law(schedule, 2.0, fall, alpha, rng.uniform(0, 0.3) * fallen)
    found = predicted(schedule, steps, losses[steps - 1])
    allowed = 0.05 if name == "constant" else 0.1 if part == 2 and name != "wsd" else 0.35
    assert found.mean == pytest.approx(losses[-1], abs=allowed * fallen)
    assert 1e-4 < found.chance_below(losses[-1]) < 1 - 1e-4


def test_predictions_are_as_sure_as_they_are_right() -> None:
    """Of 90 % intervals, 80 % hold the end at least; a curve that has gone further is predicted better."""
    widths = []
    for points in (5, 10, 20):
        inside, width = [], []
        for seed in range(60):
            schedule, steps, losses = drawn(seed, noise=0.005)
            found = predicted(schedule, steps[:points], losses[:points])
            low, high = found.quantile(0.05), found.quantile(0.95)
            inside.append(low <= losses[-1] <= high)
            width.append(high - low)
        assert np.mean(inside) > 0.8, points
        widths.append(np.mean(width))
    assert widths == sorted(widths, reverse=True)


def test_of_curves_that_are_stopped_few_would_have_won() -> None:
    """Of each ten, the rest against the best so far, by the rule of 5 %."""
    stopped = won = 0
    for first in range(0, 100, 10):
        curves = [drawn(seed, noise=0.005) for seed in range(first, first + 10)]
        best = curves[0][2].min()
        for schedule, steps, losses in curves[1:]:
            gone = next(
                (n for n in range(4, 40, 4) if predicted(schedule, steps[:n], losses[:n]).chance_below(best) < 0.05), 0
            )
            stopped += gone > 0
            won += bool(gone and losses[-1] < best)
            best = min(best, losses[: gone or None].min())
    assert stopped > 50
    assert won / stopped < 0.05


@FEW
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-5, 5))
def test_a_prediction_has_the_unit_of_the_losses(seed: int, factor: float, shift: float) -> None:
    schedule, steps, losses = drawn(seed, noise=0.01)
    one = predicted(schedule, steps[:9], losses[:9])
    other = predicted(schedule, steps[:9], factor * losses[:9] + shift)
    assert other.mean == pytest.approx(factor * one.mean + shift, rel=1e-6)
    bound = float(losses[-1])
    assert other.chance_below(factor * bound + shift) == pytest.approx(one.chance_below(bound), abs=1e-6)


@FEW
@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_a_quantile_has_its_share_below(seed: int, share: float) -> None:
    schedule, steps, losses = drawn(seed, noise=0.01)
    found = predicted(schedule, steps[:6], losses[:6])
    assert found.chance_below(found.quantile(share)) == pytest.approx(share, abs=1e-6)
    assert found.weights.sum() == pytest.approx(1.0)


def test_the_mixture_is_that_of_dense_algebra() -> None:
    """Written out for each point of the grid, with SciPy's densities."""
    schedule, steps, losses = drawn(3, noise=0.01)
    steps, seen = steps[:5], losses[:5]
    places, unit = np.array([*steps, STEPS]), np.ptp(seen)
    chances, weights = [], []
    for alpha, noise, drift in itertools.product(loss_curve.ALPHAS, loss_curve.NOISES, loss_curve.DRIFTS):
        gains = schedule.annealed[places - 1] / schedule.annealed[-1]
        power = (schedule.areas[places - 1] / schedule.areas[steps[0] - 1]) ** -alpha
        design = np.stack([np.ones(6), power, -gains]).T
        walk = np.array([[np.log(min(one, other) / steps[0]) for one in places] for other in places])
        every = design @ np.diag([9, 4, 0.15**2]) @ design.T + drift**2 * walk + noise**2 * np.eye(6)
        mean = design @ [0, 1, 0.15]
        inverse, residual = np.linalg.inv(every[:5, :5]), (seen - seen[-1]) / unit - mean[:5]
        center = mean[5] + every[5, :5] @ inverse @ residual
        variance = every[5, 5] - every[5, :5] @ inverse @ every[:5, 5]
        weights.append(multivariate_normal(np.zeros(5), every[:5, :5]).pdf(residual))
        chances.append(norm(seen[-1] + unit * center, unit * np.sqrt(variance)).cdf(2.0))
    expected = np.average(chances, weights=weights)
    assert predicted(schedule, steps, seen).chance_below(2.0) == pytest.approx(expected, rel=1e-4)


def test_a_constant_rate_leaves_a_power_law_of_the_steps() -> None:
    schedule = schedule_of("constant")
    assert schedule.areas.tolist() == list(range(1, STEPS + 1))
    assert not schedule.annealed.any()
    assert not Annealing.of(np.linspace(0, 1, 9)).annealed.any(), "a warm-up anneals nothing"


def test_a_long_curve_is_thinned_to_its_last_point() -> None:
    schedule = schedule_of("constant")
    losses = law(schedule, 2.0, 1.0, 0.5, 0.0)
    whole = predicted(schedule, range(1, 301), losses[:300])
    assert whole.mean == pytest.approx(losses[-1], abs=0.01)
    flat = predicted(schedule, range(1, 9), np.full(8, 2.0))
    assert flat.mean == pytest.approx(2.0), "a curve that does not fall"
