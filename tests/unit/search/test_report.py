"""What is shown of a search from its files: the report's panels, the standings, the lines at the terminal."""

import json
import math
import threading
from itertools import permutations
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.run.directory import RunDirectory
from raytrain.run.report.page import render
from raytrain.run.report.panel import Panel, compared
from search.journal.journal import Journal
from search.journal.reports import Reports
from search.journal.rows import read_decisions, read_reports
from search.progress import SearchDisplay
from search.report.best import expected_best
from search.report.panels import search_panels
from search.report.parallel import parallel_coordinates
from search.scheduling.driver import SegmentEnd, drive
from search.scheduling.scheduler import Problem, Scheduler
from search.scheduling.segments import Objective
from search.scheduling.work import Done, Snapshot, Work
from search.space import make_space
from search.standings import Standings, standings_of
from search.sweep.options import ExtrapolationOptions, SweepOptions
from search.sweep.searches import extrapolation, random
from search.testing import toy_search, train_toy

WORDS = ["<script>alert(1)</script>", "plain"]


def searched(
    folder: Path, engine: Scheduler, metric: str, train: Any, segments: int = 1000, name: str = "pbt"
) -> Journal:
    """Search in this process for some segments, with the files of a run."""
    section = f'name = "{name}"\nmetric = "{metric}"\nmode = "max"\n'
    (folder / "recipe.toml").write_text(f'kind = "search"\n[search]\n{section}')
    journal, reports = Journal(folder, engine), Reports(folder / "metrics.jsonl")
    journal.open()
    reports.open(journal.unfinished)

    def one(work: Work, state: bytes | None) -> SegmentEnd:
        end: SegmentEnd = train(work, state)
        reports.add(work, Done(work.attempt, Snapshot("", end.step), end.metrics))
        return end

    drive(journal, journal.store, one, stop=lambda: len(reports.read()) == segments)
    return journal


@pytest.fixture(scope="module")
def population(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    return searched(tmp_path_factory.mktemp("population"), toy_search(steps=40, population=4), "q", train_toy)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    space = {"x": {"type": "float", "low": 0, "high": 1}, "word": {"type": "choice", "values": WORDS}}
    options = SweepOptions.model_validate({"name": "random", "space": space, "trials": 8})
    engine = random(Problem(make_space(space), Objective("score", "higher"), 5), options)

    def train(work: Work, state: bytes | None) -> SegmentEnd:
        return SegmentEnd(b"", 5, {"score": -(work.changes["x"] ** 3)})

    return searched(tmp_path_factory.mktemp("sweep"), engine, "score", train, name="random")


def panels_of(journal: Journal) -> dict[str, Panel]:
    return {panel.title: panel for panel in search_panels(RunDirectory(journal.lineage.path.parent))}


def test_the_panels_of_a_population(population: Journal) -> None:
    shown = panels_of(population)
    rows = population.lineage.read()
    exploits = [row for row in rows if row["action"] == "exploit"]
    assert exploits
    assert list(shown) == [
        "Scores",
        "Best so far",
        "Best so far by steps",
        "Schedule of h0",
        "Schedule of h1",
        "The winner's ancestry",
        "Members",
    ]
    *members, copies = shown["Scores"].traces
    assert [trace["name"] for trace in members] == [f"member {number}" for number in range(4)]
    assert all(len(trace["x"]) == 40 // 5 for trace in members)
    assert copies["y"][:2] == [exploits[0]["score"], exploits[0]["parent_score"]]
    assert len(copies["x"]) == 3 * len(exploits)
    best = population.best
    assert shown["Best so far"].traces[0]["y"][-1] == best.score
    last = shown["The winner's ancestry"].rows[-1]
    assert (last[1], last[3]) == (best.member, best.score)
    assert len(shown["Members"].rows) == 4


def test_forecasts_are_shown_beside_the_ends(tmp_path: Path) -> None:
    space = {"x": {"type": "float", "low": 0, "high": 1}}
    options = ExtrapolationOptions.model_validate({"name": "extrapolation", "space": space, "trials": 8, "interval": 2})
    engine = extrapolation(Problem(make_space(space), Objective("score", "higher"), 24), options)

    def train(work: Work, state: bytes | None) -> SegmentEnd:
        return SegmentEnd(b"", work.until, {"score": work.changes["x"] - 1 / work.until})

    panel = panels_of(searched(tmp_path, engine, "score", train, name="extrapolation"))["Forecasts"]
    assert panel.note.startswith(f"{sum(row[-1] == 'stopped' for row in panel.rows)} trials stopped early; ")
    assert len(panel.rows) == 8
    for _, step, score, low, high, chance, end in panel.rows:
        assert step >= 8
        assert low < score < high
        assert (chance < 0.05) == (end == "stopped")


def test_members_of_an_interrupted_search_do_not_train(tmp_path: Path) -> None:
    journal = searched(tmp_path, toy_search(steps=40, population=4), "q", train_toy, segments=2)
    assert {row[4] for row in panels_of(journal)["Members"].rows} == {"training"}
    (tmp_path / "result.json").write_text("{}")
    assert {row[4] for row in panels_of(journal)["Members"].rows} == {"paused"}


def test_a_population_is_no_sweep_before_its_first_decision_either(tmp_path: Path) -> None:
    shown = panels_of(searched(tmp_path, toy_search(steps=40, population=6), "q", train_toy, segments=5))
    assert {row["action"] for row in read_decisions(tmp_path)} == {"start"}
    assert not {"Trials", "Importance", "Rank correlation with the score"} & shown.keys()
    assert "Schedule of h0" in shown


def test_rates_far_apart_have_a_logarithmic_axis(tmp_path: Path) -> None:
    space = {"rate": {"type": "float", "low": 1e-4, "high": 1e-1, "scale": "log"}}
    options = SweepOptions.model_validate({"name": "random", "space": space, "trials": 9})
    engine = random(Problem(make_space(space), Objective("score", "higher"), 5), options)
    rates: list[float] = []

    def train(work: Work, state: bytes | None) -> SegmentEnd:
        rates.append(work.changes["rate"])
        return SegmentEnd(b"", 5, {"score": rates[-1]})

    _, others, best, labels = panels_of(searched(tmp_path, engine, "score", train, name="random"))["Trials"].traces
    low, high = min(rates), max(rates)
    expected = [math.log(rate / low) / math.log(high / low) for rate in sorted(rates, reverse=True)]
    drawn = [*best["y"], *others["y"]]
    assert drawn[::3] == pytest.approx(expected)
    assert drawn[2::3] == [None] * 9
    assert best["y"][::3] == pytest.approx(expected[:2]), "the best fifth, rounded up"
    for x, y, text in zip(labels["x"], labels["y"], labels["text"], strict=True):
        assert low * (high / low) ** y == pytest.approx(float(text), rel=1e-3), x


@pytest.mark.parametrize(("better", "best"), [("lower", [0.0, 0.25]), ("higher", [1.0, 0.75])])
def test_the_best_fifth_stands_out(better: str, best: list[float]) -> None:
    values = {"odd": [math.inf, 1.0, 2.0, 3.0, 4.0], "wide": [1e-300, 1e-200, 1e-100, 1e-5, 1.0]}
    scores = [0.0, 1.0, 2.0, 3.0, 4.0]
    (_, _, shown, labels), _ = parallel_coordinates(values, "loss", scores, better)
    assert shown["y"][2::4] == best[:1]
    assert len(labels["x"]) <= 3 * 16
    (_, _, shown, _), _ = parallel_coordinates({}, "loss", [*scores, 4.0], better)
    assert len(shown["y"]) == 2 * 2, "rounded up"


def test_compared_sweeps_share_a_table_and_no_chart(sweep: Journal) -> None:
    panels = list(panels_of(sweep).values())
    both = {panel.title: panel for panel in compared({"a": panels, "b": panels})}
    assert (list(both["Trials"].traces), len(both["Trials"].rows)) == ([], 16)
    assert both["Scores"].traces


def test_the_panels_of_a_sweep(sweep: Journal) -> None:
    shown = panels_of(sweep)
    assert list(shown) == [
        "Scores",
        "Best so far",
        "Best so far by steps",
        "Rank correlation with the score",
        "The winner's ancestry",
        "Trials",
    ]
    assert list(shown["Trials"].columns) == ["trial", "step", "score", "state", "hyperparameters"]
    assert shown["Scores"].note == ""
    assert shown["Rank correlation with the score"].rows == [("x", -1.0, 8)]
    labels = shown["Trials"].traces[-1]
    assert {text.strip() for text in labels["text"]} > {*WORDS}
    page = render("search", "", {}, list(shown.values()))
    assert "<script>alert" not in page
    assert "<script>alert" not in json.dumps(json.loads(page.split('id="panels">')[1].split("</script>")[0]))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.sampled_from(["lower", "higher"]))
def test_the_expected_best_of_random_draws_is_the_mean_over_all_orders(scores: list[float], better: str) -> None:
    best = min if better == "lower" else max
    orders = list(permutations(scores))
    means = [fmean(best(order[:drawn]) for order in orders) for drawn in range(1, len(scores) + 1)]
    assert expected_best(scores, Objective("q", better)) == pytest.approx(means, abs=1e-12)


def test_another_search_is_shown_beside_random_search(sweep: Journal, population: Journal) -> None:
    folders = {"pbt": population, "random": sweep}
    panels = {name: list(panels_of(journal).values()) for name, journal in folders.items()}
    (shown,) = (panel for panel in compared(panels) if panel.title == "Best so far by steps")
    assert [trace["name"] for trace in shown.traces] == [
        "pbt · best",
        "random · best",
        "random · random draws, on average",
    ]
    ours, best, average = shown.traces
    assert ours["x"][-1] == 4 * 40
    assert best["x"] == average["x"] == [5 * count for count in range(1, 9)]
    assert best["y"][-1] == pytest.approx(average["y"][-1])


scalars = st.none() | st.booleans() | st.integers(-1, 99) | st.text(max_size=3) | st.floats(allow_nan=False)
values = scalars | st.dictionaries(st.sampled_from(["h0", "h1", "q", ""]), scalars | st.lists(scalars, max_size=2))


@settings(max_examples=60)
@given(data=st.data())
def test_whatever_is_in_the_files_is_reported_or_left_out(
    data: st.DataObject, population: Journal, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """They may be of a fetched run."""
    source, folder = population.lineage.path.parent, tmp_path_factory.mktemp("damaged")
    for name in ("recipe.toml", "lineage.jsonl", "metrics.jsonl"):
        lines = (source / name).read_text().splitlines()
        places = st.lists(st.integers(0, len(lines) - 1), max_size=3, unique=True)
        for place in data.draw(places) if name != "recipe.toml" else ():
            row = json.loads(lines[place])
            row[data.draw(st.sampled_from(sorted(row)))] = data.draw(values)
            lines[place] = data.draw(st.sampled_from([json.dumps(row), json.dumps(row), "", "null", lines[place][:9]]))
        (folder / name).write_text("\n".join(lines) + "\n")
    render("search", "", {}, search_panels(RunDirectory(folder)))


def test_a_search_without_a_report_has_no_panels(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('kind = "search"\nsearch = 3\n')
    assert search_panels(RunDirectory(tmp_path)) == []


def test_reports_of_segments_that_are_trained_again_are_dropped(tmp_path: Path) -> None:
    reports = Reports(tmp_path / "metrics.jsonl")
    reports.open(set())
    for row, value in ((0, 0.5), (1, float("nan"))):
        reports.add(Work("", row, row, Snapshot(), 5, {}, 0), Done("", Snapshot("", 5), {"loss": value, "odd": 1.0}))
    assert reports.metrics(0) == {"loss": 0.5, "odd": 1.0}
    assert reports.metrics(1) == {"odd": 1.0}
    again = Reports(tmp_path / "metrics.jsonl")
    again.open({1})
    assert [row["row"] for row in again.read()] == [0]
    assert again.seconds >= read_reports(tmp_path / "metrics.jsonl")[0]["seconds"]


FAILING = """
class Failing:
    def __init__(self, folder, step): ...

    def write(self, row):
        raise ConnectionError("lost")

    def close(self, failed):
        raise AssertionError("it was left out")
"""


def test_loggers_see_the_members_and_one_that_fails_is_left_out(
    tmp_path: Path, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (workplace / "mine.py").write_text(FAILING)
    reports = Reports(tmp_path / "metrics.jsonl", ["tensorboard", "mine:Failing"])
    reports.open(set())
    for step in (5, 10):
        reports.add(Work("", 0, 3, Snapshot(), step, {}, 0), Done("", Snapshot("", step), {"loss": 0.5}))
    reports.close(failed=False)
    [events] = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"member 3/loss") == 2
    assert caplog.text.count("mine:Failing failed, and gets no more of this attempt: ConnectionError: lost") == 1


def test_standings_follow_the_rows(population: Journal) -> None:
    folder = population.lineage.path.parent
    standings = standings_of(Objective("q", "higher"), read_decisions(folder), read_reports(folder / "metrics.jsonl"))
    best = population.best
    assert (standings.best.score, standings.best.member, standings.best.step) == (
        best.score,
        best.member,
        best.snapshot.step,
    )
    assert standings.steps == 4 * 40
    assert standings.failures == 0
    assert {member.state for member in standings.members.values()} == {"done"}
    assert [member.score for _, member in standings.ranked()] == sorted(
        (member.score for member in standings.members.values()), reverse=True
    )


def shown_at(population: Journal, capsys: pytest.CaptureFixture[str]) -> str:
    display = SearchDisplay(population.lineage.path.parent, Standings(Objective("q", "higher")), 40, 160)
    ended = threading.Event()
    ended.set()
    with display:
        assert display.follow(ended, lambda: None, dict)
    display.finish({"status": "done", "run": "here"})
    return capsys.readouterr().err


def test_lines_come_with_generations(population: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    best = population.best
    shown = shown_at(population, capsys)
    assert f"generation 7: 160/160 steps, best q {best.score:.4g} (member {best.member}), median " in shown
    assert shown.endswith("status  done\nrun     here\n")


def test_a_terminal_has_a_table(
    population: Journal, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    shown = shown_at(population, capsys)
    assert all(title in shown for title in ("member", "step", "q", "h0", "h1", "from", "state"))
    assert "40/40" in shown
    assert "done" in shown


def test_ctrl_c_asks_to_stop_and_the_second_one_leaves(population: Journal) -> None:
    display = SearchDisplay(population.lineage.path.parent, Standings(Objective("q", "higher")), 40, 160)
    asked: list[int] = []

    def interrupted() -> dict[int, int]:
        raise KeyboardInterrupt

    assert not display.follow(threading.Event(), lambda: asked.append(1), interrupted)
    assert asked == [1]
