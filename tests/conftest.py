"""Fixtures of all tests, and markers from folders."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    FLWR_TELEMETRY_ENABLED="0",
    HF_HUB_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    WANDB_ERROR_REPORTING="false",
)

import pytest
import torch
from hypothesis import settings

settings.register_profile("patient", deadline=None)  # a busy machine is no failure
settings.load_profile("patient")

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
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, from which modules can be imported as from a user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this process, which `launch.run` uses as it finds it."""
    import ray

    from raytrain.launch import start_ray

    start_ray(None, cpus=4)
    yield
    ray.shutdown()


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def raytrain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Call the command inside this process, as `raytrain("train", "digits")`."""
    from raytrain.command import main

    def call(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["raytrain", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return Ended(int(ended.value.code or 0), shown.out, shown.err)

    return call
