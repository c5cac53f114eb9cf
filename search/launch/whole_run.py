"""A whole run: a trial that runs a recipe of any kind from its beginning to its end, in a folder of its own."""

import contextlib
from pathlib import Path
from threading import Event

from raytrain.kinds import RunOptions, load_kind
from raytrain.launch.session import OWN_CLUSTER
from raytrain.recipe import Recipe
from raytrain.registry import resolve
from raytrain.run.directory import RunDirectory
from raytrain.run.result import Result
from search.scheduling.driver import SegmentEnd
from search.scheduling.work import Work

MEMBER_RUNS = "runs"
"""Folder of the runs in the search's; each has the number of its trial."""


class WholeRun:
    """Runs the recipes of trials, one after the other, on the Ray cluster that this process is in.

    The state of a trial is the name of its run's folder. A run that was interrupted, or whose process died, goes on.

    Args:
        base: the recipe whose fields are searched.
        folder: of the search.
    """

    def __init__(self, base: Recipe, folder: Path) -> None:
        self._base, self._folder = base, folder
        self._stop = Event()
        self._run: RunDirectory | None = None

    def train(self, work: Work, packed: bytes | None) -> SegmentEnd:  # noqa: ARG002 - the folder has the trial's number
        """Run the recipe of a trial to its end, or until asked to stop.

        Raises:
            RaytrainError: the recipe does not fit, or the run failed.
        """
        name = f"{MEMBER_RUNS}/{work.member}"
        if self._stop.is_set():
            return SegmentEnd(name.encode(), work.snapshot.step, {})
        recipe = self._base.with_overrides({"seed": work.seed, **work.changes})
        run = self._run = RunDirectory(self._folder / name)
        options = RunOptions(run.path, resume=run.recipe.is_file(), address=OWN_CLUSTER)
        log = self._folder / MEMBER_RUNS / f"{work.member}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
            result: Result = resolve({}, load_kind(recipe.kind).run, "kind")(recipe, options)
        step = work.snapshot.step if result.status == "interrupted" else work.until
        return SegmentEnd(name.encode(), step, result.metrics)

    def stop(self) -> None:
        """Ask the run to save and end; asked again, because a run forgets what it was asked before it began."""
        self._stop.set()
        if self._run and self._run.path.is_dir():
            self._run.request_stop()

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stop.is_set()
