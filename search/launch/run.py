"""Runs a search in a folder."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from raytrain.errors import CheckpointError, TrainingError
from raytrain.kinds import RunOptions
from raytrain.launch.resources import Node
from raytrain.launch.version import fingerprint
from raytrain.recipe import read_toml
from raytrain.run.directory import RunDirectory
from raytrain.run.result import Result
from raytrain.training.recipe import TrainRecipe
from search.checks import check_resume
from search.forecasts import forecast_summary, forecasts
from search.journal.ancestry import Phase, schedule
from search.journal.journal import Journal
from search.journal.reports import Reports
from search.launch.backend import SlotBackend, slot_backend
from search.launch.base import CheckedSearch, check_search
from search.launch.loop import SearchLoop
from search.launch.slots import SlotPool, SlotResources, slot_count
from search.launch.trial_options import TrialOptions
from search.launch.winner import BEST, FRONT, WINNER, copy_winner, winner_recipe, write_front, write_winner
from search.progress import SearchDisplay
from search.recipe import SearchRecipe
from search.scheduling.segments import SegmentReport
from search.standings import Standings, standings_of

SHOWN_PHASES = 3
SHOWN_FRONT = 12
NO_RESOURCES = SlotResources(0.0, {}, {})


def run_search(recipe: SearchRecipe, order: RunOptions) -> Result:
    """Search on the Ray cluster at `order.address`, or without one on this machine, and return how it ended.

    Ctrl-C pauses the members after the step that they are at; a second one ends them at once.

    Raises:
        RecipeError: the recipe, the folder or the cluster does not allow it.
        TrainingError: the search failed; what was computed is in its folder.
    """
    directory = RunDirectory(order.out.absolute())
    checked = check_search(recipe)
    recipe, standings = checked.recipe, Standings(checked.objective)
    unit = "steps" if checked.in_segments else "runs"
    display = SearchDisplay(directory.path, standings, recipe.steps, recipe.total_steps, unit)
    with directory.session(resume=order.resume), display:
        if order.resume:
            check_resume(SearchRecipe.parse(read_toml(str(directory.recipe), [])[0]).search, recipe.search)
        with slot_backend(checked.base, order.address, display.say) as backend:
            search = Search(directory, checked)
            loop = search.follow(display, backend)
        result = search.result(loop)
        try:
            directory.write_result(result)
        except OSError as error:
            display.say(f"{directory.result} could not be written: {error.strerror}")
        display.finish(search.facts(result))
    if result.error:
        raise TrainingError(f"{result.error}\nwhat was found until then is in {directory.path}")
    return result


class Search:
    """A search in its folder.

    Args:
        directory: the folder.
        checked: the search.
    """

    def __init__(self, directory: RunDirectory, checked: CheckedSearch) -> None:
        self._directory = directory
        self._recipe, self._base, self._objective = checked.recipe, checked.base, checked.objective
        self._in_segments, self._objectives = checked.in_segments, checked.objectives
        self._journal = Journal(directory.path, checked.recipe.scheduler(checked.objective))
        loggers = checked.base.log.loggers if isinstance(checked.base, TrainRecipe) else ()
        self._reports = Reports(directory.metrics, loggers, checked.recipe.statistics())

    def follow(self, display: SearchDisplay, backend: SlotBackend) -> SearchLoop:
        """Search until the end, or until Ctrl-C, and return the loop that did.

        Raises:
            RecipeError: the slots do not fit.
            CheckpointError: what is in the folder is damaged.
        """
        count, each = self._slots(backend.nodes)
        if self._recipe.space().is_single():
            display.say("the space has 1 candidate")
        what = f"with {each}" if self._in_segments else "for whole runs"
        display.say(f"starting {count} slot(s) {what}")
        self._begin()
        start = partial(backend.start, self._trial_options(each), each)
        timeout_seconds = self._recipe.search.timeout_seconds
        pool = SlotPool(start, count, timeout_seconds, replace_failed=each.workers > 1)
        with closing(SearchLoop(self._journal, self._reports, pool, self._recipe.search)) as loop:
            display.follow(loop.ended, loop.request_stop, lambda: pool.steps)
        self._reports.close(failed=loop.status == "failed")
        return loop

    def _trial_options(self, each: SlotResources) -> TrialOptions:
        path = [os.getcwd(), *(os.path.abspath(folder) for folder in sys.path)]
        whole_runs_in = None if self._in_segments else self._directory.path
        return TrialOptions(self._base.to_dict(), each.threads, path, fingerprint(), whole_runs_in)

    def _slots(self, nodes: Sequence[Node]) -> tuple[int, SlotResources]:
        """Return how many slots there are, and what each takes; of whole runs, the runs take what they need."""
        if not isinstance(self._base, TrainRecipe):
            return self._recipe.slots or 1, NO_RESOURCES
        resources, workers = self._base.resources, self._base.workers
        beside_cpus, labels = resources.extra_resources(), resources.labels
        each = SlotResources(resources.cpus, beside_cpus, labels, workers, resources.placement)
        return slot_count(self._recipe.slots, self._recipe.members, each, nodes), each

    def _begin(self) -> None:
        """Make the folder ready, and go on from what is in it."""
        self._directory.prepare(self._recipe.to_toml())
        self._journal.open()
        self._reports.open(self._journal.unfinished)
        self._directory.write_recipe(self._recipe.to_toml())  # bounds and budgets may be others than before
        self._directory.result.unlink(missing_ok=True)

    def result(self, loop: SearchLoop) -> Result:
        """Return the result of the search, and leave its best model in the folder."""
        standings = self._standings()
        figures = {"trials": len(standings.members), "failed": standings.failures}
        if self._in_segments:
            figures["steps"] = standings.steps
        result = Result(
            loop.status,
            figures=figures,
            seconds=round(self._reports.seconds, 3),
            restarts=loop.restarts,
            error=loop.error,
        )
        best = self._journal.best
        if best is None:
            return result
        metrics = self._reports.metrics(best.segment.row)
        try:
            checkpoint = self._keep(best, metrics)
            self._keep_front()
        except (CheckpointError, OSError) as error:
            return replace(result, status="failed", error=result.error or f"the best model cannot be written: {error}")
        score = {"metric": self._objective.metric, "value": best.score, "step": best.snapshot.step}
        return replace(result, metrics=metrics, best={**score, "member": best.member}, checkpoint=checkpoint)

    def _standings(self) -> Standings:
        return standings_of(self._objective, self._journal.lineage.read(), self._reports.read())

    def _keep(self, best: SegmentReport, metrics: Mapping[str, float]) -> str:
        """Leave the best model and its recipe in the folder; return its checkpoint.

        Raises:
            CheckpointError: it is damaged.
            OSError: there is no room.
        """
        recipe, state = winner_recipe(self._base, self._phases()), self._journal.store.get(best.snapshot.digest)
        if self._in_segments and isinstance(recipe, TrainRecipe):
            return str(write_winner(self._directory.path, recipe, state, best.snapshot.step, metrics))
        return copy_winner(self._directory.path, recipe, state.decode())

    def facts(self, result: Result) -> dict[str, str]:
        """Return the summary of a finished search, name -> value."""
        path, best = self._directory.path, result.best
        facts: dict[str, str] = {"status": result.status}
        if best:
            facts[f"best {best['metric']}"] = f"{best['value']:.4f}, member {best['member']}, step {best['step']}"
            facts |= {name: f"{value:.4f}" for name, value in result.metrics.items() if name != best["metric"]}
            phases = self._phases()
            shown = [*phases[:1], *phases[max(1, len(phases) - SHOWN_PHASES + 1) :]]
            facts |= {f"from step {phase.from_step}": _listed(phase.changes) for phase in shown}
        front = list(self._front().items())[:SHOWN_FRONT]
        facts |= {f"{FRONT}/{number}.toml": ", ".join(_objectives_of(values)) for number, values in front}
        facts |= {name: f"{figure:,}" for name, figure in {**result.figures, "seconds": result.seconds}.items()}
        if found := forecasts(self._journal.lineage.read()):
            facts["forecasts"] = forecast_summary(found)
        if result.restarts:
            facts["restarts"] = str(result.restarts)
        facts["run"] = str(path)
        if best:
            facts["model"] = f"{path / BEST}, as for raytrain evaluate {path}"
            facts["train it again"] = f"raytrain {self._base.kind} {path / WINNER}"
        if result.status in ("interrupted", "stopped early"):
            facts["go on"] = f"raytrain search {path} --resume"
        return facts

    def _front(self) -> dict[int, dict[str, float]]:
        """Return the members of the Pareto front, number -> objectives; none with a single objective."""
        names = [objective.metric for objective in self._objectives]
        front = self._standings().front(self._objectives) if len(names) > 1 else {}
        return {number: dict(zip(names, values, strict=True)) for number, values in front.items()}

    def _keep_front(self) -> None:
        """Leave the recipes of the Pareto front in the folder.

        Raises:
            OSError: there is no room.
        """
        members, rows = self._standings().members, self._journal.lineage.read()
        recipes = {number: winner_recipe(self._base, schedule(rows, members[number].row)) for number in self._front()}
        if recipes:
            write_front(self._directory.path, recipes)

    def _phases(self) -> list[Phase]:
        """Return what the best model was trained with."""
        best = self._journal.best
        return schedule(self._journal.lineage.read(), best.segment.row) if best else []


def _objectives_of(values: Mapping[str, float]) -> list[str]:
    """Return objectives in words, whole numbers with all their digits."""
    return [
        f"{name} = {value:,.0f}" if value.is_integer() else f"{name} = {value:.4g}" for name, value in values.items()
    ]


def _listed(changes: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}" for name, value in changes.items()
    )
