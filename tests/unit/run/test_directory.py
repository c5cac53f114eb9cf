import json
import multiprocessing
import os
import threading
import time
import uuid
from pathlib import Path

import pytest

from raytrain.errors import RecipeError, TrainingError
from raytrain.run import directory as rundir
from raytrain.run.directory import RunDirectory, package_versions
from raytrain.run.metrics import MetricsWriter
from raytrain.run.progress import ProgressDisplay, Tail, Wording
from raytrain.run.result import Result
from raytrain.run.rows import read_jsonl
from raytrain.run.watchdog import hang_file


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    opened(run, "x = 1\n", resume=False)
    return run


def opened(run: RunDirectory, recipe: str, *, resume: bool, steps: int = 0, error: Exception | None = None) -> None:
    with run.session(resume=resume):
        run.prepare(recipe)
        for step in range(steps):
            run.append(run.metrics, {"step": step + 1})
        if error:
            raise error


def test_a_new_run_needs_an_empty_folder_and_a_resumed_one_a_run(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"^--out: {run.path} is not empty; add --resume to continue the run in it"):
        opened(run, "", resume=False)
    with pytest.raises(RecipeError, match=rf"^--resume: there is no run in {tmp_path}/other; leave --resume out"):
        opened(RunDirectory(tmp_path / "other"), "", resume=True)
    opened(run, "x = 2\n", resume=True)
    assert run.recipe.read_text() == f"# {package_versions()}\nx = 1\n"  # until the checkpoint is known to fit
    run.write_recipe("x = 2\n")
    assert run.recipe.read_text() == f"# {package_versions()}\nx = 2\n"


@pytest.mark.parametrize("existed", [False, True])
def test_a_new_run_that_is_refused_leaves_nothing(tmp_path: Path, existed: bool) -> None:
    run = RunDirectory(tmp_path / "runs" / "new")
    if existed:
        run.path.mkdir(parents=True)
    with pytest.raises(RecipeError, match="no such thing"):
        opened(run, "", resume=False, error=RecipeError("no such thing"))
    assert run.path.is_dir() == run.path.parent.is_dir() == existed
    assert not existed or list(run.path.iterdir()) == []


@pytest.mark.parametrize("ended", [RecipeError("too late"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "left",
    [
        "lineage.jsonl",  # of a search
        "trials/0/checkpoints/step-00000010/manifest.json",
        "reports.bin",  # of a federated run
        "trajectory.bin",
        "restarts.jsonl",
        "checkpoints/notes.txt",  # the user's
        "hang-worker-0.txt",
    ],
)
def test_with_one_file_more_than_every_run_begins_with_all_stays(
    tmp_path: Path, left: str, ended: BaseException
) -> None:
    run = RunDirectory(tmp_path / "runs" / "new")

    def end() -> None:
        with run.session(resume=False):
            run.prepare("x = 1\n")
            (run.path / left).parent.mkdir(parents=True, exist_ok=True)
            (run.path / left).write_text("x")
            raise ended

    with pytest.raises(type(ended)):
        end()
    assert (run.path / left).is_file()
    assert run.recipe.read_text() == f"# {package_versions()}\nx = 1\n"
    opened(run, "", resume=True)


def test_all_that_a_refused_run_begins_with_goes(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "new")

    def refused() -> None:
        with run.session(resume=False):
            run.prepare("x = 1\n")
            with run.locked("worker", 0):
                run.record_attempt("x = 1\n", 0, [])
                run.request_stop()
                (run.checkpoints / rundir.RAY_MARK).touch()
                hang_file(run.path, 1).touch()  # of a worker that was killed
                (run.path / f".token-{uuid.uuid4().hex}").touch()
                run.record_failure(RecipeError("no"), 0)
            raise RecipeError("no")

    with pytest.raises(RecipeError, match="no"):
        refused()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_took_a_step_stays(run: RunDirectory, tmp_path: Path, resume: bool) -> None:
    run = run if resume else RunDirectory(tmp_path / "new")
    with pytest.raises(RecipeError, match="too late"):
        opened(run, "", resume=resume, steps=0 if resume else 1, error=RecipeError("too late"))
    assert run.recipe.is_file()


def test_a_new_run_with_a_checkpoint_stays_even_if_nothing_was_logged(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")

    def refused() -> None:
        with run.session(resume=False):
            run.prepare("")
            before = run.snapshot()
            (run.checkpoints / "step-00000004").mkdir()
            assert run.snapshot().has_trained_since(before)
            raise RecipeError("too late")

    with pytest.raises(RecipeError, match="too late"):
        refused()
    assert (run.checkpoints / "step-00000004").is_dir()


def test_workers_that_had_to_be_started_again_have_trained(run: RunDirectory) -> None:
    before = run.snapshot()
    run.record_attempt("x = 1\n", 0, [])
    assert not run.snapshot().has_trained_since(before)
    run.append(run.restarts, {"workers": {}})
    assert run.snapshot().has_trained_since(before)


def test_a_machine_without_the_folder_cannot_leave_word(tmp_path: Path) -> None:
    assert not RunDirectory(tmp_path / "not mounted here").record_failure(ValueError("x"), 0)
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_use_is_left_as_it_is(run: RunDirectory) -> None:
    run.write_result(Result("done"))
    run.request_stop()
    with (
        run.locked("command", 0),
        pytest.raises(RecipeError, match="in use by command process"),
        run.session(resume=True),
    ):
        pytest.fail("it must not be opened")
    assert run.stop_requested()
    assert run.result.is_file()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_use_is_named_as_such_for_a_new_run_too(run: RunDirectory, resume: bool) -> None:
    with run.locked("command", 0), pytest.raises(RecipeError) as refused, run.session(resume=resume):
        pytest.fail("it must not be opened")
    pid = os.getpid()
    way_out = f"wait for it, end it (kill {pid}), or name another folder"
    assert str(refused.value) == f"--out: {run.path} is in use by command process {pid}; {way_out}"
    assert not run.in_use()


def test_a_file_is_no_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RecipeError, match=rf"^--out: {tmp_path}/file is a file, and a run needs a folder; name"):
        opened(RunDirectory(tmp_path / "file"), "", resume=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_numbers_that_json_lacks_are_null(run: RunDirectory) -> None:
    run.append(run.metrics, {"step": 1, "valid": {"loss": float("nan"), "x": [float("inf"), 1.5]}})
    assert read_jsonl(run.metrics) == [{"step": 1, "valid": {"loss": None, "x": [None, 1.5]}}]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=rf"^--out: cannot write to {tmp_path}/file/run: Not a directory$"):
        opened(RunDirectory(tmp_path / "file" / "run"), "", resume=False)


def test_what_an_earlier_attempt_asked_for_is_forgotten(run: RunDirectory) -> None:
    run.request_stop()
    run.record_failure(TrainingError("x"), 0)
    run.write_result(Result("failed"))
    opened(run, "", resume=True)
    assert not run.stop_requested()
    assert run.failure() is None
    assert run.result.is_file()  # until the checkpoint is known to fit
    run.record_attempt("x = 2\n", 4, [{"pid": 1}])
    assert not run.result.exists()
    assert [row["from_step"] for row in read_jsonl(run.attempts)] == [4]


def hold(path: Path, seconds: float) -> None:
    with RunDirectory(path).locked("command", 0):
        time.sleep(seconds)


def test_only_one_process_at_a_time(run: RunDirectory) -> None:
    holder = multiprocessing.get_context("spawn").Process(target=hold, args=(run.path, 600))
    holder.start()
    lock = run.path / ".command.lock"
    while not lock.is_file() or lock.read_text() != str(holder.pid):
        time.sleep(0.05)
    with (
        pytest.raises(RecipeError, match=rf"in use by command process {holder.pid}; wait for it"),
        run.locked("command", 0),
    ):
        pass
    with run.locked("worker", 0):
        pass  # another role
    holder.kill()
    holder.join()
    with run.locked("command", 0):
        pass  # the lock ended with its process


def test_the_first_failure_stays(run: RunDirectory) -> None:
    run.record_failure(RecipeError("task: wrong"), 1)
    run.record_failure(TrainingError("later"), 0)
    failure = run.failure()
    assert (failure.message, failure.exit_status, failure.trace) == ("task: wrong", 2, "")


def test_an_error_of_the_users_code_comes_with_its_place(run: RunDirectory) -> None:
    try:
        {}["x"]
    except KeyError as error:
        run.record_failure(error, 3)
    failure = run.failure()
    assert (failure.message, failure.exit_status) == ("worker 3: KeyError: 'x'", 1)
    assert "test_directory.py" in failure.trace


def test_a_failure_on_another_machine_says_where(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir.socket, "gethostname", lambda: "node-b")
    run.record_failure(ValueError("boom"), 1)
    assert run.failure().message == "worker 1: ValueError: boom"
    monkeypatch.setattr(rundir.socket, "gethostname", lambda: "head")
    assert run.failure().message == "worker 1: ValueError: boom (on node-b)"


class Interrupted(threading.Event):
    """An end that is waited for until somebody loses patience."""

    def wait(self, timeout: float | None = None) -> bool:
        raise KeyboardInterrupt


WORDING = Wording("play", "playing", "round", "it ends", lambda row: [])


def test_the_end_of_a_run_is_told_in_its_kinds_words(run: RunDirectory, capfd: pytest.CaptureFixture[str]) -> None:
    figures = {"rounds": 1234, "bytes_up": 0, "overlap_ratio": 0.5}
    result = Result("interrupted", {"loss": 1.5}, figures=figures, seconds=2.25, checkpoint="a")
    ProgressDisplay(run, 10, WORDING).finish(result)
    shown = [" ".join(line.split()) for line in capfd.readouterr().err.split("\n") if line.strip()]
    assert shown == [
        "status interrupted",
        "loss 1.5000",
        "rounds 1,234",
        "overlap ratio 0.5",
        "seconds 2.25",
        f"run: {run.path}",
        f"continue with: raytrain play {run.path} --resume",
    ]


def test_an_interrupted_run_without_workers_has_nothing_to_wait_for(
    run: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    run.append(run.attempts, {"from_step": 0})  # of an earlier command
    display = ProgressDisplay(run, 10, WORDING)
    with pytest.raises(KeyboardInterrupt):
        display.follow(Interrupted())
    assert not run.stop_requested()
    run.append(run.attempts, {"from_step": 0})
    assert display.follow(Interrupted()) is False
    assert run.stop_requested()
    assert capfd.readouterr().err.splitlines()[-1] == (
        "ending the workers at once: what they did since the last checkpoint is lost"
    )


def test_a_resumed_recorder_drops_what_is_done_again(run: RunDirectory) -> None:
    recorder = MetricsWriter(run, 0, 0, [])
    for step in range(1, 8):
        recorder.write({"step": step, "loss": 1.0})
    recorder.close()
    with run.metrics.open("a") as lines:
        lines.write('{"step": 8, "lo')  # the process was killed here
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2, 3, 4, 5, 6, 7]
    again = MetricsWriter(run, 4, 0, [])
    again.write({"step": 5, "loss": 2.0})
    again.close()
    assert [(row["step"], row["loss"]) for row in read_jsonl(run.metrics)] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2)]


def test_an_evaluation_that_the_checkpoint_does_not_know_is_dropped(run: RunDirectory) -> None:
    for step in (2, 4):
        run.append(run.metrics, {"step": step, "loss": 1.0})
        run.append(run.metrics, {"step": step, "valid": {"loss": 1.0}})
    MetricsWriter(run, 4, 2, []).close()
    assert [(row["step"], "valid" in row) for row in read_jsonl(run.metrics)] == [(2, False), (2, True), (4, False)]


def test_a_tail_follows_a_file_that_is_added_to_and_replaced(run: RunDirectory) -> None:
    tail = Tail(run.metrics)
    assert tail.new() == []
    run.append(run.metrics, {"step": 1})
    with run.metrics.open("a") as lines:
        lines.write('{"step": ')
    assert tail.new() == [{"step": 1}]
    with run.metrics.open("a") as lines:
        lines.write("2}\n")
    assert tail.new() == [{"step": 2}]
    assert tail.new() == []
    recorder = MetricsWriter(run, 1, 0, [])  # replaces the file
    recorder.write({"step": 2})
    recorder.close()
    assert tail.new() == [{"step": 1}, {"step": 2}]
    late = Tail(run.metrics, from_end=True)
    run.append(run.metrics, {"step": 3})
    assert late.new() == [{"step": 3}]


def test_results_are_json(run: RunDirectory) -> None:
    run.write_result(Result("done", metrics={"loss": 1.5}, figures={"steps": 3}))
    assert json.loads(run.result.read_text())["metrics"] == {"loss": 1.5}


def test_a_line_of_progress_is_shown_once_and_slow_steps_by_the_minute(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("raytrain.run.progress.LINE_SECONDS", 0.0)
    display = ProgressDisplay(run, 10, WORDING)
    for step in (1, 2):
        run.append(run.metrics, {"step": step, "seconds": 30.0 * step})
        for _ in range(3):
            display._poll()
    assert capsys.readouterr().err.splitlines() == ["round 1/10  ", "round 2/10  2.0 rounds/min  240 s left"]


def test_a_resumed_run_shows_nothing_of_the_attempts_before(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("raytrain.run.progress.LINE_SECONDS", 0.0)
    for step in (1, 2):
        run.append(run.metrics, {"step": step, "seconds": 30.0 * step})
    run.append(run.metrics, {"step": 2, "valid": {"loss": 1.0}})
    display = ProgressDisplay(run, 10, WORDING)
    display._poll()
    MetricsWriter(run, 2, 2, []).close()  # replaces the file
    run.append(run.attempts, {"from_step": 2})
    display._poll()
    assert capsys.readouterr().err == ""
    run.append(run.metrics, {"step": 3, "valid": {"loss": 0.5}})
    display._poll()
    assert capsys.readouterr().err.splitlines() == ["round 3/10  valid loss 0.5000"]
