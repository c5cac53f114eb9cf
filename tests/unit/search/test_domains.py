"""Hyperparameter domains: laws of sampling and perturbation, whatever the bounds."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from search.chooser import crossing
from search.domains import Bool, Choice, Domain, Float, Int, Ordered

seeds = st.integers(0, 2**32)
factors = st.floats(1.01, 3)
bounds = st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)).filter(lambda pair: pair[0] < pair[1])


@st.composite
def floats(draw: st.DrawFn) -> Float:
    scale = draw(st.sampled_from(["linear", "log", "one-minus"]))
    low, high = draw(bounds)
    if scale == "log":
        low, high = math.exp(low / 1e5), math.exp(high / 1e5)
    if scale == "one-minus":
        low, high = 1 - math.exp(-low / 1e5), 1 - math.exp(-high / 1e5)
    step = draw(st.just(0.0) | st.floats(0, 10)) if scale == "linear" else 0.0
    return Float(low=low, high=max(high, math.nextafter(low, math.inf)), scale=scale, step=step)


@st.composite
def ints(draw: st.DrawFn) -> Int:
    low, high = sorted(draw(st.lists(st.integers(-(2**40), 2**40), min_size=2, max_size=2, unique=True)))
    if low > 0 and draw(st.booleans()):
        return Int(low=low, high=high, scale="log")
    return Int(low=low, high=high)


values = st.lists(st.integers(-3, 3) | st.text(max_size=2) | st.booleans(), min_size=2, max_size=5).filter(
    lambda items: len({(type(item), item) for item in items}) == len(items)
)
listed = st.builds(lambda items: Ordered(values=items), values) | st.builds(lambda items: Choice(values=items), values)
domains = floats() | ints() | listed | st.just(Bool())


@given(domains, seeds, factors)
def test_nothing_leaves_its_domain(domain: Domain, seed: int, factor: float) -> None:
    rng = np.random.default_rng(seed)
    value = domain.sample(rng)
    other = domain.sample(rng)
    for _ in range(20):
        assert domain.contains(value)
        unit = domain.unit(value)
        assert unit is None or 0 <= unit <= 1
        value = domain.perturb(value, rng, factor)
    assert all(domain.contains(point) for point in [*domain.grid(5), *domain.extremes(), domain.nearest(value)])
    assert crossing({"x": value}, {"x": other}, rng)("x", domain) in (value, other)


@given(ints(), seeds, factors)
def test_whole_numbers_always_change(domain: Int, seed: int, factor: float) -> None:
    rng = np.random.default_rng(seed)
    for value in (domain.low, domain.high, domain.sample(rng)):
        assert domain.perturb(value, rng, factor) != value


@given(values, seeds)
def test_ordered_values_move_to_a_neighbour(items: list[Any], seed: int) -> None:
    domain, rng = Ordered(values=items), np.random.default_rng(seed)
    for index, value in enumerate(items):
        assert abs(round(domain.unit(domain.perturb(value, rng)) * (len(items) - 1)) - index) == 1


AWAY_FROM_BOUNDS = [
    *((Int(low=-1000, high=1000), value) for value in (-50, -3, -1, 0, 1, 2, 3, 4, 8, 32, 128)),
    (Int(low=1, high=10**6, scale="log"), 1000),
    (Float(low=1e-6, high=1, scale="log"), 1e-3),
    (Float(low=0.5, high=0.99999, scale="one-minus"), 0.999),
    (Float(low=0, high=1), 0.4),
    (Float(low=-1, high=1, step=0.01), 0.0),
    (Ordered(values=[1, 2, 4, 8]), 2),
]


@pytest.mark.parametrize(("domain", "value"), AWAY_FROM_BOUNDS, ids=str)
def test_away_from_bounds_up_and_down_are_equally_likely(domain: Domain, value: Any) -> None:
    rng = np.random.default_rng(0)
    draws = 10_000
    ups = sum(domain.unit(domain.perturb(value, rng, 1.2)) > domain.unit(value) for _ in range(draws))
    assert abs(ups - draws / 2) < 4 * math.sqrt(draws / 4)


@pytest.mark.parametrize("start", [1, 2, 3, 4, 8])
def test_small_whole_numbers_do_not_drift_to_zero(start: int) -> None:
    """Truncating value * factor would bring all of them to 0 within 20 perturbations."""
    domain, rng = Int(low=0, high=1000), np.random.default_rng(start)
    ends = []
    for _ in range(1000):
        value = start
        for _ in range(20):
            value = domain.perturb(value, rng)
        ends.append(value)
    assert np.median(ends) >= start / 2


@given(floats(), seeds)
def test_a_uniform_sample_is_uniform_on_the_scale(domain: Float, seed: int) -> None:
    rng, same = np.random.default_rng(seed), np.random.default_rng(seed)
    span = max(abs(domain.low), abs(domain.high), 1e-300)
    if (domain.high - domain.low) / span > 1e-6:
        assert domain.unit(domain.sample(rng)) == pytest.approx(same.random(), abs=1e-6)


def test_perturbations_are_those_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    linear, log = Float(low=0, high=100), Float(low=1e-6, high=1, scale="log")
    beta = Float(low=0.9, high=0.9999, scale="one-minus")
    assert {round(linear.perturb(10, rng), 9) for _ in range(50)} == {12, 8}
    assert {round(log.perturb(0.012, rng), 9) for _ in range(50)} == {0.0144, 0.01}
    assert {round(beta.perturb(0.988, rng), 9) for _ in range(50)} == {0.9856, 0.99}
    assert {round(linear.perturb(90, rng), 9) for _ in range(50)} == {92, 72}, "108 is reflected at 100"


@pytest.mark.parametrize(("value", "neighbours"), [(8, {6, 10}), (-13, {-16, -10}), (0, {-1, 1}), (99, {79, 81})])
def test_steps_of_whole_numbers_are_rounded(value: int, neighbours: set[int]) -> None:
    """20 % of 13 are 2.6, so 3; 99 + 20 is reflected at 100."""
    rng = np.random.default_rng(0)
    assert {Int(low=-100, high=100).perturb(value, rng) for _ in range(50)} == neighbours


def test_all_whole_numbers_are_equally_likely() -> None:
    rng, domain = np.random.default_rng(0), Int(low=3, high=6)
    counts = np.bincount([domain.sample(rng) for _ in range(8000)], minlength=7)[3:]
    assert np.all(abs(counts - 2000) < 4 * math.sqrt(2000))


def test_only_zero_on_a_linear_scale_is_a_trap() -> None:
    assert Float(low=0, high=1).traps(0.0)
    assert not Float(low=0, high=1).traps(0.1)
    assert not Float(low=0, high=1, step=0.1).traps(0.0)
    assert not Int(low=0, high=3).traps(0)


@pytest.mark.parametrize(
    ("domain", "options", "message"),
    [
        (Float, {"low": 2, "high": 1}, "expected low < high; got low = 2 and high = 1"),
        (Int, {"low": 1, "high": 1}, "expected low < high; got low = 1 and high = 1"),
        (
            Float,
            {"low": 0, "high": 1, "scale": "log"},
            "expected low > 0 with scale = 'log'; got low = 0; use scale = 'linear'",
        ),
        (
            Float,
            {"low": 0, "high": 1, "scale": "one-minus"},
            "expected high < 1 with scale = 'one-minus'; got high = 1",
        ),
        (Choice, {"values": ["a"]}, "expected at least 2 values; got ['a']"),
        (Ordered, {"values": [1, 2, 1]}, "expected different values; got 1 twice"),
    ],
)
def test_domains_that_cannot_be(domain: type[Domain], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        domain(**options)
    assert error.value.errors()[0]["msg"] == f"Value error, {message}"
