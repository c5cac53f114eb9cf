"""What is written is there after a power cut, as far as the system is told; torn lines do no harm."""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain.errors import TrainingError
from raytrain.files import AppendOnlyFile, append_line, fsync_path, make_folder, read_bytes, write_atomic
from raytrain.run.directory import RunDirectory
from raytrain.run.rows import read_jsonl
from raytrain.testing import train_here
from raytrain.training.recipe import TrainRecipe


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was flushed to the disk, in order; of the temporary file of `write_atomic`, its target's."""
    names: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        names.append(name.split(".")[1] if name.endswith(".tmp") else name)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return names


def new_run(folder: Path) -> None:
    run = RunDirectory(folder / "run")
    with run.session(resume=False):
        run.prepare("x = 1\n")


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda folder: write_atomic(folder / "file", b"x"), ["file", "top"]),
        (lambda folder: append_line(folder / "lines", "x"), ["lines", "top"]),
        (lambda folder: append_line(folder / "there", "x"), ["there"]),
        (lambda folder: make_folder(folder / "a" / "b"), ["a", "top"]),
        (make_folder, []),
        (new_run, ["top", "run", "recipe", "run", "reserve", "run"]),
    ],
)
def test_new_files_and_folders_are_flushed_with_the_folder_that_names_them(
    tmp_path: Path, synced: list[str], write: Callable[[Path], None], expected: list[str]
) -> None:
    folder = tmp_path / "top"
    folder.mkdir()
    (folder / "there").touch()
    write(folder)
    assert [name or "reserve" for name in synced] == expected


def test_a_checkpoint_is_on_the_disk_after_the_rows_and_records_that_it_counts_on(
    tmp_path: Path, synced: list[str]
) -> None:
    plan = {"kind": "train", "task": "raytrain.testing:tiny", "steps": 6, "optimizer": "zo-sgd", "log": {"loggers": []}}
    train_here(TrainRecipe.parse(plan).with_overrides({"checkpoint.every": 2, "evaluation.every": 3}), tmp_path / "run")
    events = [name for name in synced if name in ("metrics.jsonl", "trajectory.bin", "manifest")]
    saved = ["trajectory.bin", "metrics.jsonl", "manifest"]  # after steps 2, 3 (the best so far), 4 and 6
    noted = ["metrics.jsonl", "manifest"]
    assert events == [*saved, *saved, *noted, *saved, *saved, *noted]


def test_a_file_system_without_flushed_folders_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    fsync_path(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        fsync_path(tmp_path / "file")


@given(st.binary(max_size=60), st.integers(0, 2))
def test_a_torn_line_costs_itself_and_no_other(junk: bytes, before: int) -> None:
    with TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder))
        for step in range(before):
            run.append(run.attempts, {"from_step": step})
        with run.attempts.open("ab") as file:
            file.write(junk.replace(b"\n", b""))  # a process was killed here, or the power failed
        assert [row["from_step"] for row in read_jsonl(run.attempts)] == list(range(before))
        run.append(run.attempts, {"from_step": 7})
        assert [row["from_step"] for row in read_jsonl(run.attempts)] == [*range(before), 7]


def test_what_grows_is_on_its_way_at_once_and_on_the_disk_when_kept(tmp_path: Path, synced: list[str]) -> None:
    file = AppendOnlyFile(tmp_path / "rows")
    file.write(b"one\n")
    assert (tmp_path / "rows").read_bytes() == b"one\n"
    assert synced == []
    file.fsync()
    assert synced == ["rows"]
    file.close()
    again = AppendOnlyFile(tmp_path / "rows")
    again.write(b"two\n")
    again.close()
    assert (tmp_path / "rows").read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("absent", r"\[Errno 2\] No such file or directory: '.*absent'"),
        ("folder", "it is not a regular file"),
        ("pipe", "it is not a regular file"),
        ("large", "expected at most 4 bytes; got more"),
        ("nul\0", "embedded null byte"),
    ],
)
def test_what_cannot_be_read_is_one_error(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"12345")
    with pytest.raises(TrainingError, match=rf"(?s)^{tmp_path}/{name}: cannot be read: {problem}$"):
        read_bytes(tmp_path / name, TrainingError, 4)
