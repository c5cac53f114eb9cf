"""The examples of each package, as a user runs them."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(
    file for package in ("raytrain", "search", "federated") for file in ROOT.glob(f"{package}/examples/*.py")
)

RUN_ON_A_CLUSTER = ("under_tune.py",)
"""By the tests in tests/distributed, on a cluster that they have already."""


def run(workplace: Path, example: str, *before: str) -> str:
    """Return what an example prints."""
    words = [sys.executable, *before, str(ROOT / example)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: f"{file.parts[-3]}-{file.stem}")
def test_an_example_has_at_most_40_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 40
    assert file.name in Path(__file__).read_text() or file.name in RUN_ON_A_CLUSTER, "each is run"


def test_a_task_of_ones_own(workplace: Path) -> None:
    first, second = run(workplace, "raytrain/examples/own_task.py").splitlines()
    assert first.startswith("done {'step': 300, 'loss': ")
    assert float(first.split()[-1].rstrip("}")) < 0.2, "the commoner class alone: 0.69"
    assert second == "tensor([0, 1])"


def test_diloco_around_a_loop_of_ones_own(workplace: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    lines = run(workplace, "raytrain/examples/own_loop.py", *torchrun).splitlines()
    [(_, first), (_, second)] = [
        re.fullmatch(r"loss (\S+), weights (\S+), \d+ bytes sent", line).groups() for line in lines
    ]
    assert first == second
    assert all(float(line.split()[1].rstrip(",")) < 0.1 for line in lines)


def test_a_notebook_trains_on_two_workers_searches_and_federates(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(ROOT / "raytrain/examples/notebook.ipynb", 4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in cells] == [[]] * len(cells), "it is shipped without outputs"
    sources = [cell.source for cell in cells]
    with warnings.catch_warnings():  # of the libraries of Jupyter about each other
        warnings.simplefilter("ignore")
        NotebookClient(book, timeout=600, resources={"metadata": {"path": str(workplace)}}).execute()
    assert [cell.source for cell in cells] == sources
    _, trained, plot, loaded, searched, federated = [cell.outputs for cell in cells]
    assert {output.name for output in trained} == {"stdout"}, "plain lines, and no red ones"
    first, *_, last = "".join(output.text for output in trained).splitlines()
    assert first == "starting 2 worker(s) with 1 CPU each"
    assert last.startswith("done {'step': 300, 'loss': 0.1")
    assert "image/png" in plot[0].data
    assert loaded[0].data["text/plain"] == "tensor([0, 1])"
    assert float(re.match(r"loss (\S+) with", searched[0].text)[1]) < 0.2
    before, after = re.findall(r"'loss': ([\d.]+)", federated[0].text)
    assert float(after) < float(before)


def test_a_search_in_a_loop_of_ones_own(workplace: Path) -> None:
    found = run(workplace, "search/examples/own_loop.py")
    assert float(found.split()[1]) < 1e-3


def test_a_protocol_in_a_flower_program(workplace: Path) -> None:
    before, *rounds, after = run(workplace, "federated/examples/own_app.py").splitlines()
    accuracies = [float(re.search(r"'accuracy': (\d\.\d+)", line)[1]) for line in (before, after)]
    assert accuracies[1] > accuracies[0]
    assert len(rounds) == 4
    assert (workplace / "model.safetensors").stat().st_size < 100_000


def test_a_federation_in_one_process(workplace: Path) -> None:
    before, *rounds, after, size = run(workplace, "federated/examples/one_process.py").splitlines()
    accuracies = [float(re.search(r"'accuracy': (\d\.\d+)", line)[1]) for line in (before, after)]
    assert accuracies[1] > accuracies[0]
    assert len(rounds) == 4
    assert int(size.split()[-2]) < 100_000
