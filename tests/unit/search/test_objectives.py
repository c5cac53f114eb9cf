"""Several objectives: statistics of models, limits on them, the Pareto front, and what is shown of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytrain.errors import RecipeError
from raytrain.run.directory import RunDirectory
from raytrain.run.report.panel import Panel
from raytrain.training.recipe import TrainRecipe
from search.journal.journal import Journal
from search.journal.reports import Reports
from search.journal.rows import read_reports
from search.launch.base import check_search
from search.model_statistics import ModelStatistics
from search.pareto import pareto_front
from search.recipe import SearchRecipe
from search.report.panels import search_panels
from search.scheduling.driver import SegmentEnd, drive
from search.scheduling.scheduler import Problem
from search.scheduling.segments import Objective
from search.scheduling.work import Done, Snapshot, Work
from search.space import make_space
from search.sweep.options import SweepOptions
from search.sweep.searches import random

DIGITS = TrainRecipe.parse({"kind": "train", "name": "digits", "steps": 10, "batch": 8, "task": "digits"})
SPACE = {"task": {"widths": {"type": "ordered", "values": [[4], [8], [16], [32]]}}}
points = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8)


def parse(**changes: Any) -> SearchRecipe:
    raw = {"kind": "search", "base": DIGITS.to_dict(), "search": {"name": "random", "space": SPACE}}
    return SearchRecipe.parse_with(raw, {name.replace("__", "."): value for name, value in changes.items()})


@given(points)
def test_a_front_holds_what_nothing_dominates_and_something_on_it_dominates_the_rest(rows: list[Any]) -> None:
    losses = np.array(rows, float)

    def dominates(one: Any, other: Any) -> bool:
        return bool((one <= other).all() and (one < other).any())

    front = pareto_front(losses)
    assert front.any()
    for place, on in enumerate(front):
        assert on == (not any(dominates(each, losses[place]) for each in losses))
        assert on or any(dominates(each, losses[place]) for each in losses[front])


@pytest.mark.parametrize(("widths", "depth"), [((4,), 1), ((4, 8), 2)])
def test_statistics_of_a_network_are_those_of_its_layers(widths: tuple[int, ...], depth: int) -> None:
    statistics = ModelStatistics(DIGITS, ["latency_ms"])
    before = torch.random.get_rng_state()
    cnn = statistics({"task.widths": widths, "task.depth": depth})
    assert torch.equal(before, torch.random.get_rng_state())
    layers = [width for width in widths for _ in range(depth)]
    edges = list(zip([1, *layers], layers, strict=False))
    pooled = layers[-1] * 16
    assert cnn["parameters"] == sum(9 * a * b + b for a, b in edges) + 10 * pooled + 10
    assert cnn["flops"] == 2 * (sum(9 * a * b * 64 for a, b in edges) + 10 * pooled)
    assert 0 < cnn["latency_ms"] < 1000
    assert cnn.keys() == {"parameters", "flops", "memory_mb", "latency_ms"}
    mlp = statistics({"task.model": "mlp", "task.widths": widths})
    edges = list(zip([64, *widths], [*widths, 10], strict=True))
    assert mlp["flops"] == 2 * sum(a * b for a, b in edges)


def test_memory_grows_with_the_batch_from_the_weights_and_their_moments() -> None:
    statistics = ModelStatistics(DIGITS)
    memory = [statistics.measure("memory_mb", {"batch": batch}) for batch in (1, 2, 64)]
    assert memory[2] - memory[0] == pytest.approx(63 * (memory[1] - memory[0]))
    weights = 16 * statistics.measure("parameters", {}) / 2**20
    assert weights < memory[0] < 2 * weights
    kept = 64 * 4 * (1 + 2 * 32 + 2 * 64)  # the image, and each layer's output before and after the rectifier
    assert 0.5 * kept < (memory[1] - memory[0]) * 2**20 < 2 * kept


def test_statistics_of_a_users_task_are_recorded_where_they_are_asked_for(workplace: Path) -> None:
    (workplace / "mine.py").write_text("from raytrain.tasks.digits import digits, DigitsOptions\n")
    own = TrainRecipe.parse({"kind": "train", "name": "x", "steps": 1, "task": "mine:digits"})
    assert ModelStatistics(own)({}) == {}
    assert ModelStatistics(own, ["flops"])({}).keys() == {"flops"}
    assert ModelStatistics(DIGITS, free=False)({}) == {}


def test_every_statistic_can_be_limited() -> None:
    for name, bound in {"flops": 12_000, "memory_mb": 0.06, "parameters": 2000}.items():
        recipe = parse(search__limits={name: bound})
        works = recipe.scheduler(Objective("loss", "lower")).ask(12)
        sizes = {tuple(work.changes["task.widths"]) for work in works}
        assert sizes == {(4,), (8,)}, name
    recipe = parse(search__limits={"parameters": 2000, "flops": 5000})
    with pytest.raises(RecipeError) as error:
        check_search(recipe)
    assert str(error.value) == ("search.limits.flops: none of 10,000 draws has at most 5,000; the smallest has 5,888")


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"parameters": "max"}, "parameters: expected min, as for each statistic of a model; got max"),
        ({"flops": "least"}, "flops: expected 'min' or 'max'; got 'least'"),
        ({"loss": "min", "accuracy": "max"}, "loss: the search goes by this metric, which is an objective anyway"),
        (
            {"acuracy": "max"},
            "acuracy: neither measured by the task nor a statistic; did you mean accuracy? known: accuracy, flops, "
            "latency_ms, loss, memory_mb, parameters",
        ),
    ],
)
def test_wrong_objectives_are_named(objectives: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        check_search(parse(search__metric="loss", search__mode="min", search__objectives=objectives))
    assert str(error.value) == f"search.objectives.{message}"


@pytest.mark.parametrize("section", [{"objectives": {"flops": "min"}}, {"limits": {"flops": 9}}])
def test_a_statistic_needs_a_training_recipe(section: dict[str, Any]) -> None:
    space = {"optimizer": {"lr": {"type": "float", "low": 1e-3, "high": 1e-2}}}
    search = {"name": "random", "metric": "loss", "mode": "min", "space": space, **section}
    with pytest.raises(RecipeError) as error:
        SearchRecipe.parse({"kind": "search", "base": "digits-fedkseed", "search": search})
    assert str(error.value) == (
        f"search.{next(iter(section))}.flops: a statistic of the model of a training recipe; base is a federate"
    )


def test_the_metric_is_the_first_objective() -> None:
    found = check_search(parse(search__objectives={"flops": "min"}))
    assert found.objectives == (Objective("accuracy", "higher"), Objective("flops", "lower"))


def searched(folder: Path) -> None:
    """Search in this process: the loss falls with the width, up to 16."""
    table = {"width": {"type": "ordered", "values": [1, 2, 4, 8, 16, 32]}}
    (folder / "recipe.toml").write_text(
        'kind = "search"\n[search]\nmetric = "loss"\nmode = "min"\nobjectives = {size = "min", speed = "max"}\n'
    )
    options = SweepOptions.model_validate({"name": "random", "space": table, "trials": 20})
    engine = random(Problem(make_space(table), Objective("loss", "lower"), 5), options)
    journal = Journal(folder, engine)
    reports = Reports(folder / "metrics.jsonl", (), lambda changes: {"size": float(changes["width"])})
    journal.open()
    reports.open(journal.unfinished)

    def train(work: Work, state: bytes | None) -> SegmentEnd:
        width = work.changes["width"]
        end = SegmentEnd(b"", 5, {"loss": 1 / min(width, 16), "speed": 1 / width})
        reports.add(work, Done(work.attempt, Snapshot("", 5), end.metrics))
        return end

    drive(journal, journal.store, train)


def test_the_report_shows_the_front(tmp_path: Path) -> None:
    searched(tmp_path)
    rows = read_reports(tmp_path / "metrics.jsonl")
    assert rows[0]["statistics"].keys() == {"size"}
    shown: dict[str, Panel] = {panel.title: panel for panel in search_panels(RunDirectory(tmp_path))}
    front = shown["Pareto front"]
    assert list(front.columns) == ["trial", "loss", "size", "speed", "hyperparameters"]
    widths = {row["statistics"]["size"] for row in rows}
    assert {row[2] for row in front.rows} == widths - ({32} if 16 in widths else set())
    losses = [row[1] for row in front.rows]
    assert losses == sorted(losses)
    others, chosen = shown["Pareto front: loss and size"].traces
    assert len(others["x"]) + len(chosen["x"]) == len(rows)
    assert chosen["x"] == sorted(chosen["x"])
    assert shown["Pareto front: loss and speed"].note == "Better: lower loss and higher speed."
    assert json.dumps(front.rows)
