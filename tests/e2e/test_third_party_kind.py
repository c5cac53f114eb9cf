"""A kind of runs of somebody else's, in a package of its own: all that works with raytrain's kinds works with it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytrain.run.rows import read_jsonl

INSTALLED = Path(__file__).parent / "data" / "lottery"
EACH = """
import contextlib, io, sys
from raytrain.cli.main import main

for line in sys.argv[1:]:
    sys.argv = ["raytrain", *line.split()]
    with contextlib.suppress(SystemExit):
        main()
    print("---", flush=True)
"""


@pytest.fixture
def environment() -> dict[str, str]:
    """An environment in which the package is installed."""
    return {**os.environ, "PYTHONPATH": f"{INSTALLED}:{os.environ.get('PYTHONPATH', '')}"}


@pytest.fixture
def interrupted(tmp_path: Path, environment: dict[str, str]) -> Iterator[Path]:
    """A folder with a run that Ctrl-C interrupted."""
    words = [sys.executable, "-m", "raytrain", "lottery", "quick", "draws=1000000", "--out", "run"]
    command = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) < 3 and command.poll() is None:
        time.sleep(0.01)
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=300)
    assert command.returncode == 130, err
    assert "stopping: it ends after the draw that it is at" in err
    assert f"continue with: raytrain lottery {tmp_path}/run --resume" in err
    return tmp_path


def each(folder: Path, environment: dict[str, str], *lines: str) -> list[str]:
    """Return what each command prints."""
    words = [sys.executable, "-c", EACH, *lines]
    ended = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert "raytrain:" not in ended.stderr, ended.stderr
    return ended.stdout.split("---\n")[:-1]


def test_it_is_listed_checked_interrupted_resumed_evaluated_and_reported(
    interrupted: Path, environment: dict[str, str]
) -> None:
    run = interrupted / "run"
    result = json.loads((run / "result.json").read_text())
    drawn = result["figures"]["draws"]
    assert (result["status"], drawn) == ("interrupted", len(read_jsonl(run / "metrics.jsonl")))
    listed, prizes, checked, resumed, evaluated, page = each(
        interrupted,
        environment,
        "list",
        "list prizes",
        "check quick draws=9",
        f"lottery run --resume draws={drawn + 2}",
        "evaluate run",
        "report run",
    )
    assert "lottery: recipes" in listed
    assert re.search(r"quick +A few draws", listed)
    assert re.search(r"lottery: prizes\s.*lowest", prizes, re.DOTALL)
    assert re.search(r"draws = 9 +# --set", checked)
    assert checked.splitlines()[-1] == "a draw wins with probability 1/9"
    assert resumed == ""
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["figures"]["draws"]) == ("done", drawn + 2)
    seeds = [row["step"] for row in read_jsonl(run / "metrics.jsonl")]
    assert seeds == list(range(1, drawn + 3)), "none is drawn twice"
    assert [row["from_step"] for row in read_jsonl(run / "attempts.jsonl")] == [0, drawn]
    assert (run / "recipe.toml").read_text().partition("\n")[0].split(", ")[-2] == "lottery 1.0"
    best = min(read_jsonl(run / "metrics.jsonl"), key=lambda row: row["valid"]["loss"])
    assert json.loads(evaluated) == {"step": best["step"], "loss": pytest.approx(best["valid"]["loss"])}
    assert page == "run/report.html\n"
    assert "<h2>Draws</h2>" in (run / "report.html").read_text()
