import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain.optim.schedules import SCHEDULES, lr_factor
from raytrain.registry import resolve

shapes = st.sampled_from(sorted(SCHEDULES))


@given(shapes, st.integers(1, 500), st.integers(0, 100), st.floats(0, 1), st.floats(0.01, 1))
def test_rates_rise_and_then_never_do_and_stay_between_floor_and_one(
    name: str, steps: int, warmup: int, floor: float, decay: float
) -> None:
    shape = resolve(SCHEDULES, name, "schedule.name")
    rates = [
        lr_factor(shape, step, steps=steps, warmup=warmup, min_lr_ratio=floor, decay_ratio=decay)
        for step in range(steps + 1)
    ]
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert all(0 < value < 1 for value in rising)
    assert all(later <= earlier + 1e-12 for earlier, later in zip(falling, falling[1:], strict=False))
    assert all(floor - 1e-12 <= value <= 1 for value in falling)
    assert all(value == 1 for value in falling[:1] if steps > warmup)


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"constant"}))
def test_rates_end_at_the_floor(name: str) -> None:
    shape = resolve(SCHEDULES, name, "schedule.name")
    assert lr_factor(shape, 50, steps=50, warmup=5, min_lr_ratio=0.1, decay_ratio=0.3) == pytest.approx(0.1)


def test_known_values() -> None:
    shape = resolve(SCHEDULES, "cosine", "schedule.name")
    halfway = lr_factor(shape, 60, steps=110, warmup=10, min_lr_ratio=0.2, decay_ratio=1.0)
    assert halfway == pytest.approx(0.2 + 0.8 * 0.5)
    quarter = lr_factor(shape, 35, steps=110, warmup=10, min_lr_ratio=0.0, decay_ratio=1.0)
    assert quarter == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    wsd = resolve(SCHEDULES, "wsd", "schedule.name")
    assert [
        lr_factor(wsd, step, steps=100, warmup=0, min_lr_ratio=0.0, decay_ratio=0.2) for step in (0, 79, 80, 90, 95)
    ] == pytest.approx([1, 1, 1, 0.5, 0.25])
