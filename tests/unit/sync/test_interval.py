import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain.sync import interval as pace_module
from raytrain.sync.interval import HIDING_MARGIN, MAX_OVERHEAD, MAX_STEPS, RoundTimer, SyncInterval

SECONDS = st.floats(1e-3, 10.0)


@given(SECONDS, SECONDS, st.floats(0.0, 10.0))
def test_a_round_is_as_short_as_hides_the_exchange_and_bears_its_cost(
    step: float, averager: float, cost: float
) -> None:
    pace = SyncInterval("auto", "auto")
    pace.update(step, averager, cost)
    enough = max(HIDING_MARGIN * averager / step, cost / (MAX_OVERHEAD * step))
    assert pace.every == min(MAX_STEPS, max(1, math.ceil(enough)))
    assert pace.delay == min(pace.every, math.ceil(HIDING_MARGIN * averager / step))


@given(SECONDS, SECONDS, SECONDS, st.integers(1, 50), st.data())
def test_what_is_given_stays(step: float, averager: float, cost: float, every: int, data: st.DataObject) -> None:
    delay = data.draw(st.integers(0, every))
    for pace in (SyncInterval(every, delay), SyncInterval("auto", delay), SyncInterval(every, "auto")):
        fixed = pace.is_fixed
        assert 0 <= pace.delay <= pace.every
        pace.update(step, averager, cost)
        pace.update(0.0, averager, cost)  # nothing was measured
        assert 0 <= pace.delay <= pace.every
        assert not fixed or (pace.every, pace.delay) == (every, delay)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50), st.data())
def test_a_mean_is_due_within_its_round_wherever_a_run_goes_on_from(
    every: int, was: int, now: int, data: st.DataObject
) -> None:
    before = data.draw(st.integers(0, was))
    for pace in (SyncInterval("auto", every), SyncInterval(now, "auto"), SyncInterval("auto", "auto")):
        pace.restore(was, before)
        assert 0 <= pace.delay <= pace.every


@given(st.integers(1, 50), st.floats(0.0, 1.0), st.data())
def test_of_any_distance_at_most_a_half_is_left_after_a_round(every: int, kept: float, data: st.DataObject) -> None:
    """`kept` is what a step leaves of it; at once nothing is left, for a replica goes on from the shared point."""
    delay = data.draw(st.integers(0, every))
    pull = SyncInterval(every, delay).alpha(delay)
    assert 0.5 <= pull <= 1.0
    assert abs((kept**delay - pull) * kept ** (every - delay)) <= 0.5 + 1e-12
    assert delay or pull == 1.0


def test_a_clock_tells_steps_from_waiting_and_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    now, worked = [100.0], [7.0]
    monkeypatch.setattr(pace_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(pace_module, "_worked", lambda: worked[0])
    clock = RoundTimer()
    now[0] += 0.25
    worked[0] += 0.5
    clock.add_overhead(0.05)
    assert clock.end_round(2, waited=0.1) == pytest.approx([0.05, 0.0, 0.55])
    clock.exchange_seconds = 0.3
    now[0] += 0.1
    assert clock.end_round(1, waited=0.1) == pytest.approx([0.1, 0.3, 0.0])
