import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain.cli import job_entry
from raytrain.errors import RecipeError
from raytrain.launch.jobs.job import (
    Job,
    JobLog,
    check_id,
    check_upload,
    check_uploaded,
    describe_outcome,
    new_id,
    run_location,
    uploaded_files,
)
from raytrain.launch.jobs.storage import LIST, list_files, parse
from raytrain.launch.version import fingerprint


def ended(status: str, exit_code: int | None = None, message: str = "") -> Job:
    return Job("x", (), "/x", status=status, exit_code=exit_code, message=message)


@pytest.mark.parametrize(
    ("job", "status"),
    [
        (ended("SUCCEEDED", 0), 0),
        (ended("STOPPED"), 130),
        (ended("FAILED"), 1),
        (ended("FAILED", 1), 1),
        (ended("FAILED", 2), 2),
        (ended("FAILED", 130), 130),
        (ended("FAILED", -9), 137),
    ],
)
def test_the_exit_status_is_that_of_the_jobs_command(job: Job, status: int) -> None:
    assert job.over
    assert job.exit_status == status
    assert bool(describe_outcome(job)) == bool(status)


def test_what_goes_wrong_is_explained() -> None:
    assert describe_outcome(ended("STOPPED")) == "stopped"
    assert describe_outcome(ended("FAILED", 1, "Job entrypoint command failed")) == "failed with exit status 1"
    assert describe_outcome(ended("FAILED", None, "runtime_env setup failed")) == "failed: runtime_env setup failed"
    for message in (
        "python: No module named raytrain.cli.job_entry",
        "ModuleNotFoundError: No module named 'raytrain')",
    ):
        assert "the cluster has no raytrain, or an older one" in describe_outcome(ended("FAILED", 1, message))
        assert not ended("FAILED", 1, message).began
    assert "no `python` on its PATH" in describe_outcome(ended("FAILED", 127))
    assert ended("FAILED", 1, "No module named mine").began


@given(
    st.lists(st.text("ab\n", max_size=9), max_size=5), st.lists(st.lists(st.integers(0, 50), max_size=4), max_size=4)
)
def test_a_log_that_comes_from_the_start_again_is_shown_once(written: list[str], connections: list[list[int]]) -> None:
    """However the server cuts it into pieces, and wherever the connection breaks."""
    whole = "".join(written)
    shown: list[str] = []
    log = JobLog(shown.append)
    for cuts in [*connections, [len(whole)]]:
        take = log.reader()
        ends = sorted(cuts)
        for begin, end in zip([0, *ends], ends, strict=False):
            take(whole[begin:end])
    assert "".join(shown) == whole


def test_names_differ() -> None:
    assert len({new_id("digits") for _ in range(50)}) == 50
    assert new_id("digits").startswith("digits-")


@pytest.mark.parametrize("name", ["..", ".x", "-x", "a/b", "a b", "", "x\n"])
def test_a_name_becomes_a_part_of_urls_and_paths(name: str) -> None:
    with pytest.raises(
        RecipeError, match=r"^--name: expected letters, digits, '_', '.' and '-', and neither of the la"
    ):
        new_id(name)
    with pytest.raises(RecipeError, match=r"^JOB: expected letters, digits, '_', '.' and '-', as in digits-3f2a1c; g"):
        check_id(name)


def test_the_run_lies_where_it_is_asked_for() -> None:
    assert run_location("x-1", None, None) == ("~/raytrain-runs/x-1", "")
    assert run_location("x-1", Path("/big/run"), None) == ("/big/run", "")
    assert run_location("x-1", None, "/shared") == ("/shared/x-1", "")
    assert run_location("x-1", None, "file:///shared/") == ("/shared/x-1", "")
    assert run_location("x-1", None, "s3://bucket/a") == ("~/raytrain-runs/x-1", "s3://bucket/a/x-1")
    assert run_location("x-1", Path("/big/run"), "s3://bucket/a") == ("/big/run", "s3://bucket/a/x-1")
    with pytest.raises(
        RecipeError, match=r"^--out and --storage both name the run's folder: /big/run and /shared; lea"
    ):
        run_location("x-1", Path("/big/run"), "/shared")
    with pytest.raises(
        RecipeError, match=r"^--out: expected an absolute path, as the cluster's machines see it; got 'r"
    ):
        run_location("x-1", Path("runs/x"), None)


@given(st.dictionaries(st.sampled_from(["a/1", "a/2", "b/1", "top"]), st.integers(0, 10)), st.integers(0, 40))
def test_the_limit_holds_for_all_files_together(files: dict[str, int], limit: int) -> None:
    if sum(files.values()) > limit:
        with pytest.raises(RecipeError, match=r"where Ray takes at most"):
            check_upload(files, limit, Path("/home/me"))
    else:
        check_upload(files, limit, Path("/home/me"))


def test_the_largest_folders_are_named() -> None:
    with pytest.raises(RecipeError) as caught:
        check_upload({"data/a": 60 << 20, "data/b": 70 << 20, "x.bin": 5 << 20, "s/t/u": 1}, 100 << 20, Path("/me"))
    assert str(caught.value) == (
        "a job uploads the current folder, and /me holds 135.0 MiB, where Ray takes at most 100.0 MiB; the largest "
        "in it: data/ 130.0 MiB, x.bin 5.0 MiB, s/ 0.0 MiB. Name what the job does not need in .gitignore or "
        ".rayignore, or run the command from another folder"
    )


def test_what_a_recipe_names_must_be_taken_along(tmp_path: Path) -> None:
    for name in ("mine.toml", "data/a.txt", "runs/x/recipe.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = {"mine.toml": 0, "data/a.txt": 0}
    for name in ("mine.toml", "data", "data/a.txt", "", "not/there"):
        check_uploaded({name: tmp_path / name}, files, tmp_path)
    with pytest.raises(RecipeError, match=r"^runs/x is not uploaded with the job: runs/, .venv/, .git/, what ."):
        check_uploaded({"runs/x": tmp_path / "runs/x/recipe.toml"}, files, tmp_path)
    with pytest.raises(RecipeError, match=r"^../other.toml is outside the current folder, which is what a job uploads"):
        check_uploaded({"../other.toml": tmp_path.parent / "other.toml"}, files, tmp_path)


def test_files_that_were_taken_along_are_named_as_they_were() -> None:
    there = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_4fe73a14/data/text.txt"
    raw = {"task": {"name": "text", "path": there}, "steps": 3, "log": {"loggers": []}}
    assert uploaded_files(raw) == {"task.path": "data/text.txt"}


def test_a_runs_files_are_served_and_nothing_else_and_not_for_ever(tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "place"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "a").write_text("weights")
    (tmp_path / "secret").write_text("of the user")
    (run / "link").symlink_to(tmp_path / "secret")
    (run / ".command.lock").write_text("1")
    serving = threading.Thread(target=job_entry.serve_run, args=(run, place, 1.0))
    serving.start()
    while not (place / LIST).is_file():
        time.sleep(0.01)
    assert parse((place / LIST).read_bytes()) == list_files(run)
    served = [path for path in (place / "run").rglob("*") if path.is_file()]
    assert {path.relative_to(place / "run").as_posix(): path.read_text() for path in served} == {
        "checkpoints/a": "weights"
    }
    serving.join()
    assert not place.exists()
    assert (run / "checkpoints" / "a").read_text() == "weights"
    with pytest.raises(
        RecipeError, match=r"^there is no run in .*/nothing on .*: the job left none, or it was removed$"
    ):
        job_entry.serve_run(tmp_path / "nothing", place, 1.0)


@pytest.mark.parametrize("status", [0, 1, 130])
def test_a_run_is_stored_however_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command is a small one here; what it leaves and how it ends is what counts."""
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr("raytrain.cli.main.main", lambda: leave(tmp_path / "run", status))
    monkeypatch.setattr(job_entry.signal, "signal", lambda *_: None)
    url = f"local://{tmp_path}/store/x"
    assert job_entry.run_job(["train", "digits"], tmp_path / "run", url, fingerprint()) == status
    assert set(parse((tmp_path / "store" / "x" / LIST).read_bytes())) == {"result.json"}
    assert (tmp_path / "store" / "x" / "result.json").read_text() == str(status)
    assert capsys.readouterr().out == f"stored at {url}: 0.0 MiB\n"


def test_a_run_that_is_refused_does_not_store_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be another's: of --out that is not empty, or of a resume of a run in use."""
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr("raytrain.cli.main.main", lambda: leave(tmp_path / "run", 2))
    monkeypatch.setattr(job_entry.signal, "signal", lambda *_: None)
    assert job_entry.run_job(["train", "digits"], tmp_path / "run", f"local://{tmp_path}/store/x", fingerprint()) == 2
    assert [path.name for path in (tmp_path / "store" / "x").iterdir()] == ["job.txt"]


def leave(run: Path, status: int) -> None:
    assert sys.argv == ["raytrain", "train", "digits", "--out", str(run)]
    run.mkdir(exist_ok=True)
    (run / "result.json").write_text(str(status))
    sys.exit(status)


def test_a_store_that_cannot_be_written_is_said_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"file/x cannot be used: "):
        job_entry.run_job(["train", "digits"], tmp_path / "run", f"local://{tmp_path}/file/x", fingerprint())
    assert not (tmp_path / "run").exists()


def test_another_raytrain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"is not the raytrain that submitted it; install the same on the cluster, or"
    ):
        job_entry.run_job(["train", "digits"], tmp_path / "run", None, "0" * 64)
