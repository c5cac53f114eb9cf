"""What a worker does before it trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raytrain.errors import RecipeError
from raytrain.optim.options import ALL_OPTIMIZERS
from raytrain.run.directory import RunDirectory
from raytrain.sync.transport import LocalTransport
from raytrain.testing import ThreadGroup, ThreadTransport
from raytrain.training import worker
from raytrain.training.recipe import TrainRecipe
from raytrain.training.worker import run_worker


def test_all_workers_must_see_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SHARED_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(worker.socket, "gethostname", lambda: "elsewhere")
    recipe = TrainRecipe.parse({"kind": "train", "task": "raytrain.testing:tiny", "workers": 2})
    run = RunDirectory(tmp_path / "run")
    with run.session(resume=False):
        run.prepare(recipe.to_toml())

    def replica(transport: ThreadTransport) -> None:
        seen = run if transport.rank == 0 else RunDirectory(tmp_path / "not mounted here")
        assert run_worker(recipe, seen, transport, heartbeat=lambda: None) is None

    ThreadGroup(2).run(replica)
    failure = run.failure()
    assert failure.exit_status == 2
    assert failure.message == (
        f"--out: {run.path} is not the same folder on elsewhere as for worker 0; on more than one machine it must be "
        "on a file system that they share (for a job, name one with raytrain submit --storage)"
    )
    assert not (tmp_path / "not mounted here").exists()


def test_a_worker_that_cannot_leave_word_raises_its_error(tmp_path: Path) -> None:
    recipe = TrainRecipe.parse({"kind": "train", "task": "raytrain.testing:tiny"})
    nowhere = RunDirectory(tmp_path / "not mounted here")
    with pytest.raises(RecipeError, match="^--out: cannot write to .*not mounted here: No such file or directory$"):
        run_worker(recipe, nowhere, LocalTransport(), heartbeat=lambda: None)


TRAIN = """
import sys
from pathlib import Path
from raytrain.testing import train_here
from raytrain.training.recipe import TrainRecipe

for name in sys.argv[2:]:
    task = {"name": "digits", "model": "mlp", "widths": [4]}
    raw = {"kind": "train", "task": task, "steps": 2, "log": {"loggers": []}, "optimizer": {"name": name}}
    raw["zo"] = {"first_order": ["5.*"], "trajectory": False} if name == "zo-hybrid" else {}
    run = train_here(TrainRecipe.parse(raw), Path(sys.argv[1]) / name)
    assert run.failure() is None, run.failure()
    if slow := {"torch._dynamo", "sklearn"} & sys.modules.keys():
        sys.exit(f"{name} imports {slow}")
"""


def test_training_imports_neither_torchs_compiler_nor_scikit_learn(tmp_path: Path) -> None:
    """Each takes about as long as torch, in every worker; torch imports the first to differentiate forward."""
    names = [name for name in ALL_OPTIMIZERS if name != "forward-gradient"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", TRAIN, tmp_path, *names], check=True, env=environment)
