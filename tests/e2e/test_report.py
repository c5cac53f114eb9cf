"""The report page of runs, as the command writes it and as a browser shows it."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytrain.run.directory import RunDirectory
from raytrain.testing import train_with_threads
from raytrain.training.recipe import TrainRecipe

HOSTILE = "<img src=x onerror=console.log(1)> & 'b'"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def runs(workplace: Path) -> Path:
    """A folder with two runs of two workers."""
    raw = {
        "kind": "train",
        "task": "raytrain.testing:tiny",
        "steps": 40,
        "workers": 2,
        "log": {"loggers": [], "every": 1},
    }
    recipe = TrainRecipe.parse(raw).with_overrides({"evaluation.every": 10})
    for name, changes in {"one": {}, HOSTILE: {"sync": {"name": "local-sgd", "every": 4}}}.items():
        run = train_with_threads(recipe.with_overrides({"name": "fit", **changes}), workplace / name)
        assert run.failure() is None
    return workplace


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[Path], str]:
    """Open a page, and return what a browser makes of it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed here (apt-get install chromium)")

    def document(page: Path) -> str:
        profile = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        words = [browser, *profile, "--virtual-time-budget=8000", "--enable-logging=stderr", "--dump-dom"]
        shown = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, check=True, timeout=300)
        assert [line for line in shown.stderr.splitlines() if "CONSOLE" in line] == []
        return shown.stdout

    return document


def titles(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


def figures(page: str) -> dict[str, str]:
    return dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def test_a_run_is_reported_while_it_goes_on_and_when_it_has_ended(
    runs: Path, raytrain: Callable[..., Any], opened: Callable[[Path], str]
) -> None:
    RunDirectory(runs / "one").result.unlink(missing_ok=True)  # as of one that has not ended
    ended = raytrain("report", "one")
    assert (ended.status, ended.out, ended.err) == (0, "one/report.html\n", "")
    page = opened(runs / "one" / "report.html")
    assert titles(page) == [
        "Loss",
        "Throughput",
        "Learning rate",
        "Gradient norm",
        "Bytes sent",
        "Communication and data wait",
        "Communication hidden by steps",
        "Events",
    ]
    assert page.count('class="main-svg"') >= len(titles(page)) - 1, "a chart each, and a table"
    assert figures(page) == {"status": "running, or cut off"}


def test_runs_are_compared_and_their_names_are_text(
    runs: Path, raytrain: Callable[..., Any], opened: Callable[[Path], str]
) -> None:
    result = {"status": "done", "metrics": {"loss": 0.25}, "figures": {"steps": 4000, "bytes_sent": 0}, "seconds": 1.5}
    RunDirectory(runs / "one").result.write_text(str(result).replace("'", '"'))
    ended = raytrain("report", "one", HOSTILE, "--output", "both.html")
    assert (ended.status, ended.out, ended.err) == (0, "both.html\n", "")
    page = opened(runs / "both.html").replace('<td class="number">', "<td>")
    assert "<img" not in page
    assert titles(page)[:2] == ["Results", "Loss"]
    for line in ("loss (held out)</td><td>0.25", "steps</td><td>4,000", "status</td><td>done</td><td>running, or cut"):
        assert line in page
    assert "one · training" in page
    assert "&lt;img src=x onerror=console.log(1)&gt; &amp; 'b' · training" in page


def test_what_is_no_run_is_said(workplace: Path, raytrain: Callable[..., Any]) -> None:
    ended = raytrain("report", "nothing")
    assert ended.status == 2
    assert ended.err.startswith("raytrain: nothing: there is no run here (no recipe.toml)")
