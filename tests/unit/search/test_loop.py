"""The loop of a search, with slots that train in this process."""

import time
from pathlib import Path
from typing import Any

import pytest

from search.journal.journal import Journal
from search.journal.lineage import Lineage
from search.journal.reports import Reports
from search.launch.loop import SearchLoop
from search.options import SearchOptions
from search.scheduling.driver import SegmentEnd, attempt, drive
from search.scheduling.work import Failed, Work
from search.testing import toy_search, train_toy

OPTIONS = SearchOptions(name="pbt", space={})
END_SECONDS = 60.0


class OneSlot:
    """A slot that trains when it is asked how far it is."""

    restarts = 0

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._work: tuple[Work, bytes | None] | None = None
        self.stopping = False
        self.closed = False

    @property
    def idle(self) -> int:
        return int(self._work is None)

    def submit(self, work: Work, state: bytes | None) -> None:
        self._work = (work, state)

    def stop(self) -> None:
        self.stopping = True

    def close(self) -> None:
        self.closed = True

    def wait(self) -> list[tuple[Work, SegmentEnd | Failed]]:
        if self._work is None:
            return []
        (work, state), self._work = self._work, None
        return [(work, attempt(work, state, self.train))]

    def train(self, work: Work, state: bytes | None) -> SegmentEnd:
        return train_toy(work, state)


class Damaging(OneSlot):
    """Damages the newest state once, from which a segment is to start."""

    def train(self, work: Work, state: bytes | None) -> SegmentEnd:
        end = train_toy(work, state)
        if work.snapshot.step == 10 and work.member == 1 and not (mark := self._folder / "mark").exists():
            mark.touch()
            newest = max((self._folder / "states").glob("*.state"), key=lambda file: file.stat().st_mtime_ns)
            newest.write_bytes(b"damaged")
        return end


class Interrupting(OneSlot):
    """Stops after a step of a segment when it is asked to, and asks for that itself."""

    loop: Any = None

    def train(self, work: Work, state: bytes | None) -> SegmentEnd:
        if work.snapshot.step == 10:
            self.loop.request_stop()
            end = train_toy(Work("", 0, 0, work.snapshot, 11, work.changes, 0), state)
            return SegmentEnd(end.state, 11, {})
        return train_toy(work, state)


class SlotPerMember(OneSlot):
    """As many slots as members; the segments of one member take ten times as long as those of the others."""

    idle = 4

    def __init__(self, folder: Path, slow: int, seconds: float) -> None:
        super().__init__(folder)
        self._slow, self._seconds = slow, seconds
        self._works: list[tuple[float, Work, bytes | None]] = []

    def submit(self, work: Work, state: bytes | None) -> None:
        seconds = self._seconds * (10 if work.member == self._slow else 1)
        self._works.append((time.monotonic() + seconds, work, state))
        self.idle -= 1

    def wait(self) -> list[tuple[Work, SegmentEnd | Failed]]:
        time.sleep(0.005)
        now = time.monotonic()
        ready = [(work, state) for end, work, state in self._works if end <= now]
        self._works = [waiting for waiting in self._works if waiting[0] > now]
        self.idle += len(ready)
        return [(work, attempt(work, state, self.train)) for work, state in ready]


def begun(folder: Path, slot: OneSlot, options: SearchOptions = OPTIONS, **search: Any) -> tuple[SearchLoop, Journal]:
    journal, reports = Journal(folder, toy_search(steps=30, **search)), Reports(folder / "metrics.jsonl")
    journal.open()
    reports.open(journal.unfinished)
    return SearchLoop(journal, reports, slot, options), journal


def lineage(folder: Path) -> bytes:
    return (folder / "lineage.jsonl").read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    journal = Journal(folder, toy_search(steps=30))
    journal.open()
    drive(journal, journal.store, train_toy)
    return folder


def test_it_makes_the_decisions_of_the_plain_driver(plain: Path, tmp_path: Path) -> None:
    slot = OneSlot(tmp_path)
    loop, journal = begun(tmp_path, slot)
    assert loop.ended.wait(END_SECONDS)
    assert (loop.status, loop.error) == ("done", "")
    assert lineage(tmp_path) == lineage(plain)
    assert len(Reports(tmp_path / "metrics.jsonl").read()) == 2 * 30 // 5
    loop.close()
    assert slot.closed
    assert journal.under_way == {}


def test_a_segment_whose_state_is_damaged_starts_from_the_one_before(tmp_path: Path) -> None:
    loop, journal = begun(tmp_path, Damaging(tmp_path))
    assert loop.ended.wait(END_SECONDS)
    assert (loop.status, loop.error) == ("done", "")
    rows = journal.lineage.read()
    fallbacks = [row for row in rows if row["action"] == "fallback"]
    assert fallbacks
    assert all((row["step"], row["failure"]["cause"]) == (10, "unreadable") for row in fallbacks)
    assert {row["step"] for row in rows if row["action"] == "end"} == {30}


def test_an_interrupted_search_goes_on_with_equal_decisions(plain: Path, tmp_path: Path) -> None:
    slot = Interrupting(tmp_path)
    loop, journal = begun(tmp_path, slot)
    slot.loop = loop
    assert loop.ended.wait(END_SECONDS)
    assert (loop.status, loop.error) == ("interrupted", "")
    assert slot.stopping
    assert journal.under_way == {}
    again, _ = begun(tmp_path, OneSlot(tmp_path))
    assert again.ended.wait(END_SECONDS)
    assert lineage(tmp_path) == lineage(plain)


def test_a_member_ten_times_slower_is_waited_for_unless_a_quorum_may_go_on(tmp_path: Path) -> None:
    options = OPTIONS.model_copy(update={"timeout_seconds": 0.15})
    population = {"population": 4, "first": (), "exploit": "truncation"}
    folders = {quorum: tmp_path / str(quorum) for quorum in (1.0, 0.75)}
    for quorum, folder in folders.items():
        folder.mkdir()
        slots = SlotPerMember(folder, slow=2, seconds=0.03)
        loop, _ = begun(folder, slots, options, **population, quorum=quorum)
        assert loop.ended.wait(END_SECONDS)
        assert (loop.status, loop.error) == ("done", "")
    (tmp_path / "plain").mkdir()
    plain = Journal(tmp_path / "plain", toy_search(steps=30, **population))
    plain.open()
    drive(plain, plain.store, train_toy)
    assert lineage(folders[1.0]) == lineage(tmp_path / "plain")
    rows = Lineage(folders[0.75] / "lineage.jsonl").read()
    given_up = [row for row in rows if "failure" in row]
    assert {(row["member"], row["failure"]["cause"]) for row in given_up} == {(2, "slow")}
    assert given_up[0]["action"] == "replace"
    assert {row["member"] for row in rows if row["action"] == "end"} >= {0, 1, 3}


def test_a_defect_is_told_to_whoever_waits(tmp_path: Path) -> None:
    class Broken(OneSlot):
        def wait(self) -> list[tuple[Work, SegmentEnd | Failed]]:
            raise ZeroDivisionError("ours")

    loop, _ = begun(tmp_path, Broken(tmp_path))
    assert loop.ended.wait(END_SECONDS)
    assert (loop.status, loop.error) == ("failed", "ZeroDivisionError: ours")
