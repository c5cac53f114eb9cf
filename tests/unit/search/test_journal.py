"""A search on disk: killed between any two file operations it goes on as if nothing had happened."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raytrain.errors import CheckpointError
from search.journal.journal import Journal
from search.journal.lineage import Lineage
from search.scheduling.driver import drive, run_attempt
from search.scheduling.work import Done, Snapshot
from search.testing import toy_search, train_toy

OPERATIONS = [(os, "write"), (os, "fsync"), (os, "truncate"), (Path, "open"), (Path, "replace"), (Path, "unlink")]


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@contextmanager
def killed_at(operation: int) -> Iterator[list[int]]:
    """End at the n-th file operation, before it, or in the middle of a write; yields the number of operations."""
    count = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            count[0] += 1
            if count[0] == operation:
                if function is write:
                    function(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise Killed
            return None if function is fsync else function(*arguments, **named)

        return call

    write, fsync = os.write, os.fsync
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield count


def journal(folder: Path, **options: Any) -> Journal:
    folder.mkdir(exist_ok=True)
    return Journal(
        folder, toy_search(**{"steps": 15, "population": 4, "exploit": "truncation", "first": (), **options})
    )


def run(folder: Path) -> Journal:
    opened = journal(folder)
    opened.open()
    drive(opened, opened.store, train_toy)
    return opened


def state_of(folder: Path) -> dict[str, Any]:
    """The scheduler's state, without the count of restarts."""
    state = json.loads((folder / "state.json").read_text())["state"]["scheduler"]
    return {**state, "queue": {**state["queue"], "incarnation": 0}}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    run(tmp_path / "whole")
    return tmp_path / "whole"


def test_a_kill_between_any_two_file_operations_changes_nothing(tmp_path: Path, whole: Path) -> None:
    with killed_at(0) as count:
        run(tmp_path / "counted")
    assert count[0] > 100
    for operation in range(1, count[0] + 1):
        folder = tmp_path / str(operation)
        with killed_at(operation), pytest.raises(Killed):
            run(folder)
        with killed_at(0):
            resumed = run(folder)
        assert (folder / "lineage.jsonl").read_bytes() == (whole / "lineage.jsonl").read_bytes(), operation
        assert state_of(folder) == state_of(whole), operation
        assert [file.stem for file in (folder / "states").iterdir()] == [resumed.best.snapshot.digest]
        assert not list(folder.glob(".*"))


def test_a_state_is_on_disk_before_anything_refers_to_it(tmp_path: Path) -> None:
    """After every operation, all states that state.json needs can be read."""
    with killed_at(0) as count:
        run(tmp_path / "counted")
    for operation in range(1, count[0] + 1):
        folder = tmp_path / str(operation)
        with killed_at(operation), pytest.raises(Killed):
            run(folder)
        if (folder / "state.json").exists():
            opened = journal(folder)
            with killed_at(0):
                opened.open()
            for digest in opened.digests():
                assert opened.store.get(digest)


PROGRAM = """
import sys
from pathlib import Path
from search.journal.journal import Journal
from search.scheduling.driver import drive
from search.testing import toy_search, train_toy

journal = Journal(Path(sys.argv[1]), toy_search(steps=15, population=4, exploit="truncation", first=()))
journal.open()

def train(work, state):
    print(work.row, flush=True)
    return train_toy(work, state)

drive(journal, journal.store, train)
"""


def test_a_killed_process_goes_on_with_the_same_decisions(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    for segments in (5, 6, None):
        with subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE) as process:
            for _ in range(segments or 0):
                process.stdout.readline()
            if segments:
                process.kill()
            process.communicate()
        assert process.returncode == (-signal.SIGKILL if segments else 0)
    assert (folder / "lineage.jsonl").read_bytes() == (whole / "lineage.jsonl").read_bytes()
    assert state_of(folder) == state_of(whole)


def test_collection_leaves_files_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "states"
    folder.mkdir(parents=True)
    others = ["notes.state", f"{'A' * 64}.state", f"{'a' * 64}.state.bak", ".hidden.tmp"]
    for name in others:
        (folder / name).touch()
    (folder / f".{'a' * 64}.state.{'b' * 32}.tmp").touch()
    (folder / f"{'a' * 64}.state").touch()
    best = run(tmp_path / "run").best.snapshot.digest
    assert sorted(file.name for file in folder.iterdir()) == sorted([*others, f"{best}.state"])


def edited(lines: list[str], row: int) -> list[str]:
    return [*lines[:row], lines[row].replace('"member": ', '"member": 1'), *lines[row + 1 :]]


DAMAGE: list[tuple[Callable[[list[str]], list[str]], str]] = [
    (lambda lines: edited(lines, 6), "row 6 was changed after row 7 was written"),
    (lambda lines: edited(lines, len(lines) - 1), "row 15 was changed after it was written"),
    (lambda lines: [*lines[:5], "{", *lines[6:]], "row 5 was changed: it is no longer JSON"),
    (lambda lines: [*lines[:5], *lines[6:], lines[-1]], "row 5 is lost; row 6 is in its place"),
    (lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]], "row 5 is lost; row 6 is in its place"),
    (lambda lines: lines[:8], "rows 8 to 11 are lost"),
    (lambda lines: [], "rows 0 to 11 are lost"),
    (lambda lines: [*lines, lines[-1]], "row 16 and later ones are not of this search, which has 16 rows"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
def test_a_row_that_is_lost_or_changed_is_named(
    whole: Path, damage: Callable[[list[str]], list[str]], message: str
) -> None:
    file = whole / "lineage.jsonl"
    file.write_text("".join(f"{line}\n" for line in damage(file.read_text().splitlines())))
    with pytest.raises(CheckpointError) as error:
        journal(whole).open()
    assert str(error.value) == f"{file}: {message}"


@pytest.mark.parametrize("kept", ["", '{"action": "end", "bef'])
def test_a_torn_last_row_is_healed(whole: Path, kept: str) -> None:
    file = whole / "lineage.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:-1], kept]))
    assert len(Lineage(file).read()) == len(lines) - 1
    journal(whole).open()
    assert file.read_text() == "".join(lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"until": 5', '"until": 6', 1), "its contents changed since it was written"),
        (lambda text: text[:-40], "cannot be read: JSONDecodeError: "),
        (lambda text: '{"format": 1}', "cannot be read: KeyError: 'sha256'"),
        (lambda text: "3", "cannot be read: TypeError: "),
        (lambda text: text.replace('"format": 2', '"format": 7'), "expected format 2; got 7; go on with that version"),
    ],
)
def test_a_damaged_state_is_named(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    opened = journal(tmp_path)
    opened.open()
    opened.ask(4)
    file = tmp_path / "state.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{file}: {message}')}"):
        journal(tmp_path).open()


def test_attempts_of_before_a_restart_are_refused(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.open()
    old = first.ask(4)
    second = journal(tmp_path)
    second.open()
    assert [work.row for work in second.ask(4)] == [work.row for work in old]
    assert second.tell(Done(old[0].attempt, Snapshot("a", 5), {"q": 1.0})).startswith("attempt 0.0.0 is not under way")


def test_an_unreadable_donor_is_replaced_by_its_previous_state(tmp_path: Path) -> None:
    """And the lineage says so: the parent is the segment before the donor's last one."""
    opened = journal(tmp_path)
    opened.open()
    for _ in range(8):
        opened.tell(run_attempt(opened.ask(1)[0], opened.store, train_toy))
    [work] = opened.ask(1)
    file = tmp_path / "states" / f"{work.snapshot.digest}.state"
    file.write_bytes(b"rot")
    opened.tell(run_attempt(work, opened.store, train_toy))
    rows = opened.lineage.read()
    assert rows[-1]["action"] == "fallback"
    assert rows[-1]["failure"] == {
        "cause": "unreadable",
        "message": f"{file}: its contents changed since it was written",
    }
    assert rows[-1]["parent_row"] == rows[rows[work.row]["parent_row"]]["parent_row"]
    drive(opened, opened.store, train_toy)
    assert [row["action"] for row in opened.lineage.read()[-4:]] == ["end"] * 4


def test_bounds_can_be_narrowed_and_old_results_stay(tmp_path: Path) -> None:
    """What is under way keeps its values; decisions from then on are inside the new bounds."""
    opened = journal(tmp_path)
    opened.open()
    for _ in range(6):
        opened.tell(run_attempt(opened.ask(1)[0], opened.store, train_toy))
    before = opened.lineage.read()
    narrow = Journal(tmp_path, toy_search(steps=15, population=4, exploit="truncation", first=(), bounds=(0.4, 0.5)))
    narrow.open()
    drive(narrow, narrow.store, train_toy)
    rows = narrow.lineage.read()
    assert rows[: len(before)] == before
    explored = [row["new"] for row in rows[len(before) :] if row["action"] == "exploit"]
    assert explored
    assert all(0.4 <= value <= 0.5 for new in explored for value in new.values())
