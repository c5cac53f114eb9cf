"""The examples of each package, as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(
    file for package in ("raytrain", "search", "federated") for file in ROOT.glob(f"{package}/examples/*")
)


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
    assert file.name in Path(__file__).read_text(), "each is run here"


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
