"""The loop of a search: hands segments to slots, and what becomes of them to the journal."""

import threading
import time
from typing import Literal

from raytrain.errors import RaytrainError
from search.journal.journal import Journal
from search.journal.reports import Reports
from search.launch.slots import SlotPool
from search.options import SearchOptions
from search.scheduling.driver import outcome_of, read_state
from search.scheduling.work import Done, Failed, Work, WorkOutcome

SearchStatus = Literal["done", "stopped early", "interrupted", "failed"]
CLOSE_SECONDS = 10.0
"""How long the loop may take to see that it is to end at once."""


class SearchLoop(threading.Thread):
    """Searches beside the main thread, which keeps Ctrl-C for itself.

    Args:
        journal: not yet opened.
        reports: where the ends of segments are kept.
        pool: of slots.
        options: the `[search]` section.

    Attributes:
        ended: set when the search has ended.
        status: how.
        error: why it failed.
    """

    def __init__(self, journal: Journal, reports: Reports, pool: SlotPool, options: SearchOptions) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.status: SearchStatus = "interrupted"
        self.error = ""
        self._journal, self._reports, self._pool, self._options = journal, reports, pool, options
        self._asked_to_stop = threading.Event()
        self._abandoned = threading.Event()
        self._last_outcome = time.monotonic()
        self.start()

    @property
    def restarts(self) -> int:
        """How often a slot's process had to be started again."""
        return self._pool.restarts

    def run(self) -> None:
        """Search to the end, or until asked to stop; an error waits in `error`."""
        try:
            self.status = self._search()
        except RaytrainError as error:
            self.status, self.error = "failed", str(error)
        except Exception as error:  # of Ray or the disk: whoever waits for the end has to hear of it
            self.status, self.error = "failed", f"{type(error).__name__}: {error}"
        finally:
            self.ended.set()

    def request_stop(self) -> None:
        """Have the members pause after the step that they are at, and the search end."""
        self._asked_to_stop.set()

    def close(self) -> None:
        """End the search at once, if it has not ended; a resume goes on from the last decisions."""
        self._abandoned.set()
        self.ended.wait(CLOSE_SECONDS)
        self._pool.close()

    def _search(self) -> SearchStatus:
        while not self._abandoned.is_set():
            stopping = self._why_to_stop()
            if stopping:
                self._pool.stop()
            idle = 0 if stopping else self._pool.idle
            spent = idle > 0 and not self._hand_out(idle)
            if not self._journal.under_way and (stopping or spent):
                return stopping or "done"
            self._take_in()
        return "interrupted"

    def _why_to_stop(self) -> SearchStatus | None:
        if self._asked_to_stop.is_set():
            return "interrupted"
        seconds = self._options.seconds
        return "stopped early" if seconds and self._reports.seconds >= seconds else None

    def _hand_out(self, idle: int) -> bool:
        """Give work to slots that wait for some; return whether there was any."""
        works = self._journal.ask(idle)
        for work in works:
            state = read_state(work, self._journal.store)
            if isinstance(state, Failed):
                self._tell(work, outcome_of(work, self._journal.store, state))
            else:
                self._pool.submit(work, state)
        return bool(works)

    def _take_in(self) -> None:
        """Learn which segments have ended, and give up those that a quorum has waited for long enough.

        Slots go on with what was decided before, while what has ended is written down.
        """
        ended = self._pool.wait()
        ready = min(self._pool.idle, self._journal.waiting)
        if ready and not self._why_to_stop():
            self._hand_out(ready)
        for work, end in ended:
            if not self._abandoned.is_set():
                self._tell(work, outcome_of(work, self._journal.store, end))
        if time.monotonic() - self._last_outcome > self._options.timeout_seconds:
            self._journal.expire()
            self._last_outcome = time.monotonic()

    def _tell(self, work: Work, outcome: WorkOutcome) -> None:
        self._last_outcome = time.monotonic()
        if isinstance(outcome, Done) and outcome.attempt in self._journal.under_way:
            self._reports.add(work, outcome)  # before the decision, so that none is made of what is not written down
        self._journal.tell(outcome)
