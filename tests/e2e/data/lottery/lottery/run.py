"""Runs a lottery: a thread draws while `supervise` shows how it goes."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from lottery.recipe import LotteryRecipe
from lottery.results import result_of, trained

from raytrain.kinds import RunOptions
from raytrain.launch.supervise import supervise
from raytrain.run.directory import RunDirectory
from raytrain.run.progress import ProgressDisplay, Wording
from raytrain.run.result import Result
from raytrain.run.rows import read_jsonl


def columns(row: Mapping[str, Any]) -> list[str]:
    """Return what is shown of a draw beside its loss."""
    return []


WORDING = Wording("lottery", "drawing", "draw", "it ends after the draw that it is at", columns)


def run(recipe: LotteryRecipe, order: RunOptions) -> Result:
    """Draw, and return how it ended."""
    directory = RunDirectory(order.out.absolute())
    return supervise(
        directory,
        recipe.to_toml(),
        partial(joined, recipe, directory),
        ProgressDisplay(directory, recipe.draws, WORDING),
        partial(result_of, recipe, directory),
        resume=order.resume,
    )


@contextlib.contextmanager
def joined(
    recipe: LotteryRecipe, directory: RunDirectory, say: Callable[[str], None]
) -> Iterator[Callable[[], "Drawing"]]:
    """Yield what starts to draw."""
    say("drawing on this machine")
    yield partial(Drawing, recipe, directory)


class Drawing(threading.Thread):
    """Draws until there are enough, or until it is asked to end."""

    def __init__(self, recipe: LotteryRecipe, directory: RunDirectory) -> None:
        super().__init__(daemon=True)
        self.ended, self.error = threading.Event(), ""
        self._recipe, self._directory, self._closed = recipe, directory, threading.Event()
        self.start()

    def run(self) -> None:
        """Draw."""
        try:
            done = len(read_jsonl(self._directory.metrics))
            self._directory.record_attempt(self._recipe.to_toml(), done, [{"pid": os.getpid()}])
            for seed in range(done + 1, self._recipe.draws + 1):
                if self._closed.is_set() or self._directory.stop_requested():
                    break
                loss = trained(seed).evaluate()["loss"]
                self._directory.append(self._directory.metrics, {"step": seed, "valid": {"loss": loss}})
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self.ended.set()

    def close(self) -> None:
        """End after the draw that it is at."""
        self._closed.set()
        self.join()
