"""What the person at the terminal sees of a search: a table of its members there, a line a generation elsewhere."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raytrain.run.progress import Tail
from raytrain.terminal import printable, printable_line, progress_console
from search.standings import Standings

SEARCH_POLL_SECONDS = 0.25
SEARCH_LINE_SECONDS = 10.0
MOST_ROWS = 24
"""Members in the table; of more, those with the best scores."""


class SearchDisplay:
    """Shows how a search goes. It reads the files that the search writes.

    Args:
        folder: of the run.
        standings: without a row.
        steps: of a whole training.
        total_steps: of all members together; 0: not known beforehand.
        unit: of what is counted, "steps" or whole "runs".
    """

    def __init__(self, folder: Path, standings: Standings, steps: int, total_steps: int, unit: str = "steps") -> None:
        self._console = progress_console()
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._decisions = Tail(folder / "lineage.jsonl")
        self._reports = Tail(folder / "metrics.jsonl")
        self._standings, self._steps, self._total_steps, self._unit = standings, steps, total_steps, unit
        self._pace = SearchSpeed()
        self._next_line = time.monotonic() + SEARCH_LINE_SECONDS

    def __enter__(self) -> Self:
        """Show the table, on a terminal."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the table away."""
        self._live.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(printable(text), markup=False)

    def follow(
        self, ended: threading.Event, request_stop: Callable[[], None], steps: Callable[[], Mapping[int, int]]
    ) -> bool:
        """Show progress until the search has ended; return False if it was interrupted twice and still goes on.

        Args:
            ended: set when the search has ended.
            request_stop: called at the first Ctrl-C.
            steps: returns member -> how far it is, of those that train.
        """
        asked = False
        while True:
            try:
                done = ended.wait(SEARCH_POLL_SECONDS)
                self._look(steps())
                if done:
                    return True
            except KeyboardInterrupt:
                if asked:
                    return False
                asked = True
                request_stop()
                self.say("stopping: members pause after the step that they are at; Ctrl-C again ends them at once")

    def finish(self, facts: Mapping[str, str]) -> None:
        """Print how the search ended: name -> value, a line each."""
        self._live.stop()
        width = max(map(len, facts))
        for name, value in facts.items():
            self.say(f"{name:<{width}}  {printable_line(value)}")

    def _look(self, steps: Mapping[int, int]) -> None:
        """Take in what is new in the run's files."""
        standings, before = self._standings, self._standings.generation
        for row in self._decisions.new():
            standings.decided(row)
        for row in self._reports.new():
            standings.reported(row)
        trained = standings.steps + sum(standings.ahead(member, step) for member, step in steps.items())
        self._pace.update(trained)
        if self._live.is_started:
            self._live.update(Group(self._table(steps), Text(self._summary(trained))), refresh=True)
        elif standings.generation > before or (steps and time.monotonic() > self._next_line):
            self._next_line = time.monotonic() + SEARCH_LINE_SECONDS
            self.say(self._summary(trained))

    def _table(self, steps: Mapping[int, int]) -> Table:
        standings = self._standings
        fields = standings.moving()
        table = Table("member", "step", standings.objective.metric, *map(_short, fields), "from", "state", box=None)
        for number, member in standings.ranked()[:MOST_ROWS]:
            live = number in steps
            table.add_row(
                str(number),
                f"{max(member.step, steps.get(number, 0))}/{self._steps}",
                _number(member.score),
                *(_number(member.values.get(name)) for name in fields),
                "" if member.parent is None else str(member.parent),
                member.state if live or member.state != "training" else "waiting",
            )
        return table

    def _summary(self, trained: int) -> str:
        standings, metric = self._standings, self._standings.objective.metric
        head = f"generation {standings.generation}: " if standings.generation else ""
        parts = [f"{trained}{f'/{self._total_steps}' if self._total_steps else ''} {self._unit}"]
        if standings.best:
            parts.append(f"best {metric} {_number(standings.best.score)} (member {standings.best.member})")
            parts.append(f"median {_number(standings.median())}")
        if standings.failures:
            parts.append(f"{standings.failures} failed")
        if speed := self._pace.steps_per_second:
            parts.append(f"{speed:.{0 if self._unit == 'steps' else 3}f} {self._unit}/s")
            if self._total_steps:
                parts.append(f"{max(0, self._total_steps - trained) / speed:.0f} s left")
        return head + ", ".join(parts)


class SearchSpeed:
    """How fast steps are done, on average since the first one of this process."""

    def __init__(self) -> None:
        self.steps_per_second = 0.0
        self._first: tuple[float, int] | None = None

    def update(self, steps: int) -> None:
        """Update the speed with the number of steps done by now."""
        now = time.monotonic()
        if self._first is None or steps <= self._first[1]:
            self._first = (now, steps)
        elif now > self._first[0]:
            self.steps_per_second = (steps - self._first[1]) / (now - self._first[0])


def _short(field: str) -> str:
    """Return the end of a dotted field, or two parts of it where that says little."""
    return field.removeprefix("task.").removeprefix("optimizer.")


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else printable_line(str(value))
