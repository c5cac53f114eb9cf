"""What the report says of the predictor of a sweep: importances with their errors, predictions against scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.run.directory import RunDirectory
from search.chooser import Configuration
from search.journal.journal import Journal
from search.journal.reports import Reports
from search.predictor.predictor import Predictor
from search.report.model import Observed, importances, model_panels
from search.report.panels import search_panels
from search.scheduling.driver import SegmentEnd, drive
from search.scheduling.scheduler import Problem
from search.scheduling.segments import Objective
from search.scheduling.work import Done, Snapshot, Work
from search.space import make_space
from search.surrogate.encoding import FloatArray
from search.sweep.options import PriorOptions
from search.sweep.searches import gp, random

TABLE = {
    "lr": {"type": "float", "low": 1e-4, "high": 1.0, "scale": "log"},
    "norm": {"type": "choice", "values": ["none", "batch"]},
    "idle": {"type": "float", "low": 0, "high": 1},
}
LOSS = Objective("loss", "lower")


class Linear(Predictor):
    """f = sum of factor_i * position_i; values without an order have the position of their index."""

    def __init__(self, **factors: float) -> None:
        self._factors = factors

    def fit(self, configurations: Sequence[Configuration], targets: FloatArray, rng: np.random.Generator) -> None: ...

    def predict(self, configurations: Sequence[Configuration]) -> tuple[FloatArray, FloatArray]:
        means = [
            sum(
                self._factors[each.path] * (each.domain.unit(each.value) or each.domain.index(each.value))
                for each in one.genome.decisions
            )
            for one in configurations
        ]
        return np.array(means), np.ones(len(means))

    def leave_one_out(self) -> FloatArray:
        return np.zeros(0)


@settings(max_examples=10, deadline=None)
@given(a=st.floats(0.2, 3), b=st.floats(0.2, 3), seed=st.integers(0, 99))
def test_shares_of_a_linear_predictor_are_its_squared_factors(a: float, b: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    trials = [({"a": x, "b": y, "c": 1}, x) for x, y in rng.random((30, 2)).tolist()]
    observed = Observed.of(trials)
    assert list(observed.domains) == ["a", "b"], "c never differs"
    shares = importances(observed, Linear(a=a, b=b), rng)
    assert shares[0] / shares[1] == pytest.approx(a**2 / b**2)
    assert shares.sum() == pytest.approx(1, abs=0.25), "the variance is that of 400 draws"


scalars = st.none() | st.booleans() | st.integers(-9, 10**6) | st.text(max_size=2) | st.floats()
rows = st.dictionaries(st.sampled_from("abc"), scalars | st.lists(scalars, max_size=2))


@settings(max_examples=12, deadline=None)
@given(trials=st.lists(st.tuples(rows, st.floats()), min_size=10, max_size=12))
def test_whatever_the_files_hold_as_values_is_modelled_or_left_out(trials: list[Any]) -> None:
    for panel in model_panels(LOSS, trials, "gp"):
        assert panel.traces


def test_what_matters_is_on_top_and_what_does_not_is_within_its_error() -> None:
    rng, space = np.random.default_rng(0), make_space(TABLE)
    trials = []
    for _ in range(60):
        values = space.sample(rng).genome.values()
        trials.append((values, 0.1 + abs(float(np.log10(values["lr"])) + 2) + (values["norm"] == "batch")))
    [importance, predictions] = model_panels(LOSS, trials, "gp")
    [bars] = importance.traces
    assert bars["y"] == ["idle", "norm", "lr"]
    assert bars["x"][0] < 0.05
    assert bars["x"][2] > 0.4
    points = predictions.traces[0]
    assert np.corrcoef(points["x"], points["y"])[0, 1] > 0.9
    assert min(points["x"]) == pytest.approx(min(score for _, score in trials))
    higher = model_panels(Objective("score", "higher"), [(values, -loss) for values, loss in trials], "gp")
    assert max(higher[1].traces[0]["x"]) == pytest.approx(-min(points["x"]))
    assert [panel.title for panel in model_panels(LOSS, trials, "")] == ["Importance"]
    assert model_panels(LOSS, trials[:5], "gp") == []
    assert model_panels(LOSS, [(values, 1.0) for values, _ in trials], "gp") == []


@pytest.mark.parametrize("engine", [random, gp])
def test_panels_are_made_from_the_files_of_a_sweep(engine: Any, tmp_path: Path) -> None:
    name = engine.__name__
    (tmp_path / "recipe.toml").write_text(
        f'kind = "search"\n[search]\nname = "{name}"\nmetric = "loss"\nmode = "min"\n'
    )
    options = PriorOptions.model_validate({"name": name, "space": TABLE, "trials": 12})
    journal = Journal(tmp_path, engine(Problem(make_space(TABLE), LOSS, 5), options))
    reports = Reports(tmp_path / "metrics.jsonl")
    journal.open()
    reports.open(journal.unfinished)

    def train(work: Work, state: bytes | None) -> SegmentEnd:
        end = SegmentEnd(b"", 5, {"loss": abs(np.log10(work.changes["lr"]) + 2) + 0.1})
        reports.add(work, Done(work.attempt, Snapshot("", 5), end.metrics))
        return end

    drive(journal, journal.store, train)
    titles = [panel.title for panel in search_panels(RunDirectory(tmp_path))]
    assert "Importance" in titles
    assert ("Predicted against true" in titles) == (name == "gp")
