"""The journal: a scheduler whose decisions survive the process."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raytrain.errors import CheckpointError
from raytrain.files import write_atomic
from search.journal.lineage import Chain, Lineage
from search.journal.store import StateStore
from search.scheduling.scheduler import Scheduler
from search.scheduling.segments import SegmentReport
from search.scheduling.work import Work, WorkOutcome

STATE_FORMAT = 2


class Journal:
    """A scheduler and its files: `state.json`, `lineage.jsonl` and the folder `states`, for one process at a time.

    After each outcome the scheduler's state, with the rows that it has just decided on, replaces `state.json` in one
    operation. Then the rows are added to the lineage, then states that nothing refers to are removed. A kill between
    two of these leaves a state to go on from; `open` does what is left of the rest.

    Args:
        folder: of the run.
        scheduler: newly made.
    """

    def __init__(self, folder: Path, scheduler: Scheduler) -> None:
        self.store = StateStore(folder / "states")
        self.lineage = Lineage(folder / "lineage.jsonl")
        self._file = folder / "state.json"
        self._scheduler = scheduler
        self._chain = Chain()

    def open(self) -> None:
        """Go on from what is in the folder, if there is anything.

        Raises:
            CheckpointError: it is damaged; the message names the file, and of the lineage the row.
        """
        if self._file.exists():
            state = self._read()
            self._chain = Chain(**state["chain"])
            self.lineage.heal(self._chain, state["tail"])
            self._scheduler.load_state_dict(state["scheduler"])
        self.store.clean()
        for leftover in self._file.parent.glob(f".{self._file.name}.*.tmp"):
            leftover.unlink()
        self._commit()  # so that attempts of before are void before the first new one is handed out

    def ask(self, limit: int) -> list[Work]:
        """Return at most `limit` segments to train now; see `Scheduler.ask`."""
        works = self._scheduler.ask(limit)
        if rows := self._scheduler.drain():
            self._commit(rows)
        return works

    def tell(self, outcome: WorkOutcome) -> str:
        """Learn how an attempt ended, and return "" or why the outcome was refused; see `Scheduler.tell`."""
        refused = self._scheduler.tell(outcome)
        if not refused:
            self._commit(self._scheduler.drain())
        return refused

    @property
    def best(self) -> SegmentReport | None:
        """The best report so far."""
        return self._scheduler.best

    @property
    def waiting(self) -> int:
        """How many segments are decided on and not handed out."""
        return self._scheduler.waiting

    @property
    def under_way(self) -> Mapping[str, Work]:
        """The attempts that are handed out and not ended."""
        return self._scheduler.under_way

    @property
    def unfinished(self) -> set[int]:
        """The rows of the segments that have not ended."""
        return self._scheduler.unfinished

    def digests(self) -> set[str]:
        """Return the states that a later decision, or a resume, can need."""
        return self._scheduler.digests()

    def expire(self) -> bool:
        """Give up what others have waited for long enough; see `Scheduler.expire`."""
        expired = self._scheduler.expire()
        if expired:
            self._commit(self._scheduler.drain())
        return expired

    def _commit(self, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        chain, lines = self._chain.extended(rows)
        state = {
            "chain": {"rows": chain.rows, "head": chain.head},
            "tail": lines,
            "scheduler": self._scheduler.state_dict(),
        }
        signed = {"format": STATE_FORMAT, "sha256": _sha256(state), "state": state}
        try:
            write_atomic(self._file, _canonical(signed))
            self._chain = chain
            if lines:
                self.lineage.append(lines)
        except OSError as error:
            raise CheckpointError(f"{self._file}: cannot be written: {error.strerror}") from error
        self.store.collect(self._scheduler.digests())

    def _read(self) -> dict[str, Any]:
        try:
            raw = json.loads(self._file.read_bytes())
            version, sha256, state = raw["format"], raw["sha256"], raw["state"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{self._file}: cannot be read: {type(error).__name__}: {error}") from error
        if version != STATE_FORMAT:
            raise CheckpointError(
                f"{self._file}: expected format {STATE_FORMAT}; got {version}; go on with that version"
            )
        if _sha256(state) != sha256:
            raise CheckpointError(f"{self._file}: its contents changed since it was written")
        checked: dict[str, Any] = state
        return checked


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


def _sha256(state: Any) -> str:
    return hashlib.sha256(_canonical(state)).hexdigest()
