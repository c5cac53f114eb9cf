"""What the command says and returns without starting anything."""

import json
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from federated.tables import PARTITIONS, PROTOCOLS
from raytrain.kinds import load_kinds
from raytrain.launch.version import fingerprint
from raytrain.models.options import ADAPTERS
from raytrain.optim.options import OPTIMIZERS
from raytrain.run.checkpoint import list_checkpoints
from raytrain.run.directory import RunDirectory
from raytrain.sync.options import SYNCHRONISERS
from raytrain.testing import train_here
from raytrain.training.recipe import TrainRecipe


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "read-only", "ro")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "small", "size=600k")


def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_check_shows_each_value_and_where_it_comes_from(raytrain: Callable[..., Any], workplace: Path) -> None:
    (workplace / "mine.toml").write_text('task = "digits"\nsteps = 7\n[optimizer]\nlr = 0.1\n')
    ended = raytrain("check", "mine.toml", "--set", "workers=2", "optimizer.weight_decay=0.5")
    assert ended.status == 0
    lines = {line.split(" = ")[0]: line for line in ended.out.splitlines()}
    assert lines["steps"].split("  # ")[1] == lines["optimizer.lr"].split("  # ")[1] == "mine.toml"
    assert lines["workers"].split("  # ")[1] == lines["optimizer.weight_decay"].split("  # ")[1] == "--set"
    assert lines["schedule.name"].split("  # ")[1] == "default"
    resolved = TrainRecipe.parse(tomllib.loads(ended.out))
    assert (resolved.name, resolved.steps, resolved.workers, resolved.optimizer.lr) == ("mine", 7, 2, 0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "digit"],
            "'digit' is neither a file, nor a run's folder with a recipe.toml, nor a shipped recipe, nor a task as "
            "module:attribute; did you mean digits or digits-tpe?",
        ),
        (["train", "digits", "--set", "wrokers=2"], "wrokers: no such field; did you mean workers?"),
        (
            ["train", "digits", "task.path=x"],
            "task.path: no such field; did you mean depth? known: depth, dropout, model",
        ),
        (["train", "digits", "workers=1000"], "workers: 1000 workers of 1 CPU each do not fit on 1 machine(s) with "),
        (["train", "digits", "workers"], "'workers': expected FIELD=VALUE, as in optimizer.lr=0.001"),
        (["train", "shakespeare-cpu", "task.path=nowhere.txt"], "task.path: no such file or folder: "),
        (["train", "digits", "--resume"], "--resume: say which run, as in raytrain train runs/NAME-TIME --resume"),
        (["train", "digits", "--resume", "--out", "nothing"], "there is no run in "),
        (["train", "mine:broken"], "task.name: cannot import 'mine': SyntaxError: invalid syntax (mine.py, line 1)"),
        (
            ["train", "digits", "task=mine:broken"],
            "cannot import 'mine': SyntaxError: invalid syntax (mine.py, line 1)",
        ),
        (["train", "digits", "optimizer.lr=-1"], "optimizer.lr: expected greater than or equal to 0; got -1"),
        (
            ["train", "digits", "optimizer=torch.optim:Rprop", "optimizer.lr=-1"],
            "torch.optim:Rprop refuses its options: ",
        ),
        (["train", "digits", 'callbacks=["nowhere:x"]'], "callbacks: cannot import 'nowhere': ModuleNotFoundError"),
        (["train", "mine2:raises"], "task.name: mine2:raises raised ValueError: cannot (mine2.py, line 2)"),
        (["check", "mine3:task"], "task.name: cannot import 'mine3': SystemExit: 3 (mine3.py, line 1)"),
        (["train", "digits", "sync.timeout_seconds=inf"], "sync.timeout_seconds: expected a finite number; got inf"),
        (["train", "digits", "name=a/b"], "name: String should match pattern"),
        (["train", "digits", "resources.cpus=999"], "resources.cpus: a worker of 999 CPU does not fit on any machine"),
        (["check", "digits", "steps=-1"], "steps: expected greater than or equal to 1; got -1"),
        (["list", "optimiser"], "'optimiser' is not a table; did you mean optimizers?"),
        (["evaluate", "nothing"], "nothing: there is no run here (no recipe.toml)"),
        (["trian", "digits"], "No such command 'trian'"),
        (["train"], "Missing argument 'RECIPE'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    raytrain: Callable[..., Any], workplace: Path, words: list[str], message: str
) -> None:
    (workplace / "mine.py").write_text("def broken(:\n")
    (workplace / "mine2.py").write_text("def raises():\n    raise ValueError('cannot')\n")
    (workplace / "mine3.py").write_text("raise SystemExit(3)\n")
    ended = raytrain(*words)
    assert ended.status == 2
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert not (workplace / "runs").exists()


def test_short_forms_come_from_where_they_were_given(raytrain: Callable[..., Any], workplace: Path) -> None:
    (workplace / "mine.toml").write_text('task = "digits"\n')
    lines = [line.split() for line in raytrain("check", "mine.toml", "optimizer=lion").out.splitlines()]
    assert ["task.name", "=", '"digits"', "#", "mine.toml"] in lines
    assert ["optimizer.name", "=", '"lion"', "#", "--set"] in lines


def test_an_unreachable_cluster_is_said(raytrain: Callable[..., Any], workplace: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = raytrain("train", "digits", "--address", address, "--out", "run")
    assert ended.status == 2
    assert f"--address: no Ray cluster answers at {address}" in ended.err
    assert not (workplace / "run").exists()


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(raytrain: Callable[..., Any], workplace: Path) -> None:
    assert raytrain("train", "raytrain.testing:tiny", "steps=4", "resources.cpus=1", "--out", "run").status == 0
    kept = [workplace / "run" / name for name in ("recipe.toml", "result.json")]
    before = [file.read_text() for file in kept]
    ended = raytrain("train", "run", "--resume", "steps=6", "optimizer=sgd")
    assert ended.status == 1
    assert "this checkpoint's optimizer is adamw, and the recipe's is sgd; set optimizer.name=adamw" in ended.err
    assert [file.read_text() for file in kept] == before
    assert raytrain("train", "run", "--resume", "steps=6").status == 0
    assert "steps = 6" in (workplace / "run" / "recipe.toml").read_text()


def test_a_new_run_that_a_worker_refuses_leaves_nothing(raytrain: Callable[..., Any], workplace: Path) -> None:
    (workplace / "short.txt").write_text("ab" * 50)
    ended = raytrain(
        "train",
        "stdlib-lm",
        "task.path=short.txt",
        "task.block=95",
        "task.stride=0",
        "workers=1",
        "resources.cpus=1",
        "--out",
        "run",
    )
    assert (ended.status, "part of the text is shorter than task.block = 95" in ended.err) == (2, True)
    assert not (workplace / "run").exists()


def test_a_run_of_another_kind_is_not_trained(raytrain: Callable[..., Any], workplace: Path) -> None:
    (workplace / "other.toml").write_text('kind = "serach"\n')
    ended = raytrain("train", "other.toml")
    assert (ended.status, "kind: no such kind 'serach'; " in ended.err) == (2, True)
    install(workplace, "greet = greeting:KIND")
    (workplace / "greeting.py").write_text(
        "from raytrain.kinds import Kind\nKIND = Kind('greeting:Recipe', 'greeting:run')\n"
    )
    (workplace / "hello.toml").write_text('kind = "greet"\n')
    ended = raytrain("train", "hello.toml")
    assert (ended.status, "hello.toml is a recipe to greet: raytrain greet hello.toml" in ended.err) == (2, True)


def test_a_read_only_folder_is_refused(raytrain: Callable[..., Any], read_only: Path) -> None:
    ended = raytrain("train", "digits", "--out", str(read_only / "run"))
    assert ended.status == 2
    assert f"--out: cannot write to {read_only}/run: Read-only file system" in ended.err


def test_a_full_disk_keeps_what_was_complete(small_disk: Path) -> None:
    """The first checkpoints fit; then the disk is full, and the message names the last one that is complete."""
    recipe = TrainRecipe.parse(
        {
            "kind": "train",
            "task": {"name": "digits", "widths": [64]},
            "steps": 40,
            "checkpoint": {"every": 2, "keep": 50},
            "log": {"loggers": []},
        }
    )
    run = train_here(recipe, small_disk / "run")
    message = run.failure().message
    assert message.startswith("checkpoint step-000000")
    assert "No space left on device" in message
    assert not list(run.checkpoints.glob(".*partial"))
    again = RunDirectory(small_disk / "run")
    assert again.failure() is not None
    (small_disk / "run" / "checkpoints" / "step-00000002" / "rank-00000.safetensors").unlink()
    assert train_here(recipe.with_overrides({"checkpoint.keep": 1}), small_disk / "run").failure() is None


def test_a_disk_that_fills_up_while_logging_leaves_word(small_disk: Path) -> None:
    recipe = TrainRecipe.parse(
        {
            "kind": "train",
            "task": {"name": "digits", "widths": [4]},
            "steps": 9000,
            "log": {"every": 1, "loggers": []},
            "checkpoint": {"every": 100},
            "evaluation": {"every": 0},
        }
    )
    run = train_here(recipe, small_disk / "run")
    assert "No space left on device" in run.failure().message
    assert len(list_checkpoints(run.checkpoints)) == 2


def test_the_version_is_told(raytrain: Callable[..., Any]) -> None:
    assert raytrain("--version").out == f"raytrain {version('raytrain')}\n"


def test_list_names_everything_with_a_line_each(raytrain: Callable[..., Any]) -> None:
    ended = raytrain("list")
    assert ended.status == 0
    for word in ("recipes", "digits", "shakespeare-cpu", "stdlib-lm", "adamw", "cosine", "ddp", "tensorboard"):
        assert word in ended.out
    only = raytrain("list", "schedules")
    assert "Constant, then linear decay" in only.out
    assert "adamw" not in only.out


def test_evaluate_measures_the_best_checkpoint(raytrain: Callable[..., Any], workplace: Path) -> None:
    recipe = TrainRecipe.parse(
        {
            "kind": "train",
            "task": {"name": "digits", "model": "mlp"},
            "steps": 30,
            "ema": 0.9,
            "evaluation": {"every": 10},
            "optimizer": {"lr": 0.01},
        }
    )
    run = train_here(recipe, workplace / "run")
    ended = raytrain("evaluate", "run")
    assert ended.status == 0
    found = json.loads(ended.out)
    logged = {
        row["step"]: row["valid"] for row in map(json.loads, run.metrics.read_text().splitlines()) if "valid" in row
    }
    best = max(logged, key=lambda step: (logged[step]["accuracy"], -step))
    assert found == {"step": best, **{name: pytest.approx(value) for name, value in logged[best].items()}}
    assert raytrain("evaluate", "run", "evaluation.batch=7").status == 0
    other = raytrain("evaluate", "run", "task.widths=[5]")
    assert other.status == 1
    assert "this checkpoint is of another model: " in other.err


def test_what_trains_nothing_imports_neither_torch_nor_ray(workplace: Path) -> None:
    """Each of them takes seconds, on a slow machine many, which nobody should wait to be told of a typing error."""
    commands = [
        (["--help"], 0),
        (["list"], 0),
        *((["check", file], 0) for file in load_kinds()["train"].shipped()),
        *((["check", "digits", f"optimizer={name}"], 0) for name in OPTIMIZERS),
        (["check", "digits", "optimizer=zo-hybrid", "zo.first_order=['*']", "zo.trajectory=false"], 0),
        *((["check", "digits", f"sync={name}"], 0) for name in SYNCHRONISERS),
        *((["check", "digits", f"adapter={name}"], 0) for name in ADAPTERS),
        (["explain", "optimizer.lr"], 0),
        (["explain", "max_steps"], 0),
        (["runs", "."], 0),
        (["copy", "digits", "copied.toml"], 0),
        (["check", "copied.toml", "epochs=2"], 0),
        (["completion", "bash"], 0),
        (["completion", "bash", "--", "train", "digits", "optimizer", "=", "ada"], 0),
        (["trian", "digits"], 2),
        (["train", "digit"], 2),
        (["train", "digits", "wrokers=2"], 2),
        (["train", "digits", "optimizer=admw"], 2),
        (["train", "digits", "optimizer.lr=-1"], 2),
        (["train", "digits", "adapter=lora", "adapter.rank=3"], 2),
        (["train", "digits", "sync=co2", "sync.penalty=x"], 2),
        (["federate", "digits-fedkseed", "wrokers=2"], 2),
        *((["federate", "digits-fedkseed", f"protocol={name}", "protocol.batch=0"], 2) for name in PROTOCOLS),
        *((["federate", "digits-fedkseed", f"partition={name}", "partition.size=0"], 2) for name in PARTITIONS),
        (["explain", "clients.per_round"], 0),
        (["submit", "--", "trian", "digits"], 2),
        (["list", "optimiser"], 2),
    ]
    ours = [([str(word) for word in words], status) for words, status in commands]
    script = f"""
import sys
from raytrain.cli.main import main
for words, expected in {ours!r}:
    sys.argv = ["raytrain", *words]
    try:
        main()
    except SystemExit as ended:
        assert (ended.code or 0) == expected, (words, ended.code)
    heavy = sys.modules.keys() & {{"torch", "ray", "transformers", "peft", "numpy", "datasets"}}
    assert not heavy, (words, heavy)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=workplace)
    assert ended.returncode == 0, ended.stderr[-2000:]
    for word in ("train", "evaluate", "check", "list", "Classification of handwritten digits"):
        assert word in ended.stdout


def test_a_recipe_is_copied_and_a_file_never_overwritten(raytrain: Callable[..., Any], workplace: Path) -> None:
    copied = raytrain("copy", "digits-pbt")
    assert copied.out == "edit digits-pbt.toml, then: raytrain search digits-pbt.toml\n"
    assert raytrain("check", "digits-pbt.toml").status == 0
    (workplace / "digits-pbt.toml").write_text("mine")
    again = raytrain("copy", "digits-pbt")
    assert (again.status, "FILE: digits-pbt.toml exists; name another file" in again.err) == (2, True)
    assert (workplace / "digits-pbt.toml").read_text() == "mine"
    assert "RECIPE: 'digit' is not a shipped recipe; did you mean digits or" in raytrain("copy", "digit").err


def test_a_field_is_explained_and_runs_are_listed(raytrain: Callable[..., Any], workplace: Path) -> None:
    explained = raytrain("explain", "gradient_accumulation_steps").out
    assert explained.startswith(
        "accumulate (train)\n  type: integer >= 1\n  default: 1\n  micro-batches of each worker"
    )
    train_here(
        TrainRecipe.parse({"kind": "train", "task": "raytrain.testing:tiny", "steps": 4}), workplace / "runs" / "a"
    )
    heading, row = raytrain("runs").out.splitlines()
    assert heading.split() == ["run", "kind", "status", "best", "step", "started"]
    assert row.split()[:4] == ["runs/a", "train", "killed", "loss"]


def install(workplace: Path, kinds: str) -> None:
    """Make a folder what an installed package with entry points is."""
    (workplace / "greeting-1.0.dist-info").mkdir()
    (workplace / "greeting-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n"
    )
    (workplace / "greeting-1.0.dist-info" / "entry_points.txt").write_text(f"[raytrain.kinds]\n{kinds}\n")


def test_a_kind_that_cannot_be_loaded_breaks_only_itself(raytrain: Callable[..., Any], workplace: Path) -> None:
    install(workplace, "greet = greeting:KIND")
    (workplace / "greeting.py").write_text("import nowhere\n")
    (workplace / "hello.toml").write_text('kind = "greet"\n')
    message = "kind: greet cannot be loaded from greeting:KIND: ModuleNotFoundError: No module named 'nowhere'"
    listed = raytrain("list", "schedules")
    assert (listed.status, listed.err.count(message)) == (0, 1)
    assert "Constant, then linear decay" in listed.out
    assert raytrain("check", "digits").status == 0
    ended = raytrain("check", "hello.toml")
    assert (ended.status, message in ended.err) == (2, True), ended.err


def test_the_fingerprint_of_the_code_covers_every_kind(workplace: Path) -> None:
    before = fingerprint()
    install(workplace, "greet = greeting.kind:KIND")
    (workplace / "greeting").mkdir()
    (workplace / "greeting" / "__init__.py").write_text("")
    (workplace / "greeting" / "kind.py").write_text("import nowhere\n")
    (workplace / "greeting" / "deep").mkdir()
    (workplace / "greeting" / "deep" / "inside.py").write_text("x = 1\n")
    installed = fingerprint()
    (workplace / "greeting" / "deep" / "inside.py").write_text("x = 2\n")
    assert len({before, installed, fingerprint()}) == 3
