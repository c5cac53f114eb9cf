"""The Gaussian process of PB2 against its equations."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from search.pbt.time_varying_gp import START, Encoder, Inputs, TimeVaryingGP, kernel
from search.space import make_space

thetas = st.lists(st.floats(-1, 1), min_size=5, max_size=5).map(lambda shift: START + np.array(shift))


def points(seed: int, count: int) -> Inputs:
    rng = np.random.default_rng(seed)
    numbers = rng.random((count, 3))
    numbers[rng.random((count, 3)) < 0.2] = np.nan
    return Inputs(rng.integers(0, 9, count).astype(float), numbers, rng.integers(-1, 3, (count, 2)))


def covariance(theta: np.ndarray, one: Inputs, i: int, other: Inputs, j: int) -> float:
    """The equations of the module, for one pair of points."""
    variance, length, _ = np.exp(theta[:3])
    epsilon, m = 0.5 / (1 + math.exp(-theta[3])), 1 / (1 + math.exp(-theta[4]))
    square = 0.0
    for u, v in zip(one.numbers[i], other.numbers[j], strict=True):
        if math.isnan(u) != math.isnan(v):
            square += 1
        elif not math.isnan(u):
            square += (u - v) ** 2
    similarity = math.exp(-square / (2 * length**2))
    equal = np.mean([a == b for a, b in zip(one.classes[i], other.classes[j], strict=True)])
    similarity = (1 - m) * (similarity + equal) / 2 + m * similarity * equal
    return variance * similarity * (1 - epsilon) ** (abs(one.times[i] - other.times[j]) / 2)


@given(thetas, st.integers(0, 1000))
def test_the_kernel_is_that_of_the_equations(theta: np.ndarray, seed: int) -> None:
    one, other = points(seed, 4), points(seed + 1, 3)
    expected = [[covariance(theta, one, i, other, j) for j in range(3)] for i in range(4)]
    np.testing.assert_allclose(kernel(theta, one, other), expected, rtol=1e-12)
    assert np.linalg.eigvalsh(kernel(theta, one, one)).min() > -1e-9


def line(xs: list[float], times: list[float]) -> Inputs:
    return Inputs(np.array(times), np.array(xs)[:, None], np.zeros((len(xs), 0), np.int64))


def test_what_is_long_ago_counts_less() -> None:
    """The same place was good once, and bad ever since."""
    xs, times = [0.5] * 8 + [0.0, 1.0], [*range(8), 7, 7]
    values = np.array([1.0] * 4 + [-1.0] * 4 + [0.0, 0.0])
    process = TimeVaryingGP.fit(line(xs, times), values, line([], []))
    early, late = (process.predict(line([0.5], [time]))[0][0] for time in (0, 8))
    assert late < -0.3
    assert early > 0.3


def test_what_is_pending_lowers_the_deviation_and_not_the_mean() -> None:
    observed, values = line([0.1, 0.3, 0.9], [0, 1, 2]), np.array([1.0, 0.0, -1.0])
    without = TimeVaryingGP.fit(observed, values, line([], []))
    pending = TimeVaryingGP.fit(observed, values, line([0.6], [3]))
    (mean, deviation), (same, lower) = (process.predict(line([0.6], [3])) for process in (without, pending))
    assert mean == same
    assert lower < deviation / 1.5


def test_dimensions_that_are_inactive_or_have_lost_a_value_have_a_place() -> None:
    table = {
        "kind": {"type": "choice", "values": ["a", "b"]},
        "rate": {"type": "float", "low": 0, "high": 1, "when": {"kind": "b"}},
    }
    space = make_space(table)
    active, inactive = space.replay({"kind": "b", "rate": 0.25}), space.replay({"kind": "a"})
    gone = space.replay({"kind": "c"})
    inputs = Encoder.of([inactive, active]).inputs([active, inactive, gone], [0, 0, 0], [0.5, 0.5, 0.5])
    np.testing.assert_array_equal(inputs.numbers, [[0.25, 0.5], [math.nan, 0.5], [math.nan, 0.5]])
    np.testing.assert_array_equal(inputs.classes, [[1], [0], [-1]])
