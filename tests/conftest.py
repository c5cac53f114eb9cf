"""Fixtures of all tests, and markers from folders."""

import os
import sys
from pathlib import Path

os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    FLWR_TELEMETRY_ENABLED="0",
    HF_HUB_OFFLINE="1",
)

import pytest
import torch

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data", default=str(ROOT.parent / "shared" / "data"), help="folder of the data sets of the tests"
    )


@pytest.fixture(autouse=True)
def threads() -> None:
    """Fix the number of threads, on which sums depend."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--data"))


@pytest.fixture
def shakespeare(data_folder: Path) -> Path:
    file = data_folder / "tinyshakespeare" / "input.txt"
    if not file.is_file():
        pytest.skip(f"no {file}: name the folder of the data sets with --data")
    return file


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, from which modules can be imported as from a user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]
