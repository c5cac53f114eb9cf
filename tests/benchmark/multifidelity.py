"""How soon a search that stops bad trials early has the best of 27 training recipes, beside training all to the end.

    python tests/benchmark/multifidelity.py

What is really run: each recipe, a small GPT on the bytes of tinyshakespeare, is trained to the end once, in segments of
60 steps by the trial of a search, and its held-out losses and seconds are recorded (`--curves`; those in the file are
not trained again). What is replayed: the searches, with 10 orders of the recipes and two trials at a time. A search's
decisions depend on scores and on the order in which they arrive alone, and a trial that pauses goes on to the bit as if
it had not; so the real schedulers, told the recorded losses when a clock of the recorded seconds says so, decide as
they would have. The clock counts steps, evaluations, and the packing and unpacking of states, of trials that do not
slow each other down; not the starting of processes and the decisions themselves. Ray's ASHA is Ray's own scheduler
object, told by `on_trial_result` what a trial reports at its rungs; Ray is not started. Both ASHAs have rungs at a
ninth, a third and all of the steps, and the brackets of Hyperband begin at each of these.

A search's time is the seconds until it has the lowest loss of all recipes at their ends. One that has stopped the best
recipe never gets there: it is given its own whole time, and then that of training all to the end.
"""

import heapq
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import RESULTS, finish, parse, parser_of
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from recorded_curves import INTERVAL, Recording, base_recipe, recordings

from raytrain.recipe import options_parameter
from raytrain.registry import resolve
from search.forecasts import Forecast, forecasts
from search.options import SearchOptions
from search.scheduling.scheduler import Problem, Scheduler
from search.scheduling.segments import Objective
from search.scheduling.work import Done, Snapshot
from search.searchers.random import RandomSearcher
from search.space import Space
from search.tables import SEARCHES

RECIPES, STEPS, SEEDS = 27, 1620, 10
QUICK_RECIPES, QUICK_STEPS = 9, 540
SLOTS, ETA, LOWEST = 2, 3, 1 / 9
"""LOWEST: share of a training at which both ASHAs, and the first bracket of Hyperband, have their lowest rung."""
FULL, PROMOTION, HYPERBAND, RAY = "all to the end", "ASHA with promotion", "Hyperband", "Ray's ASHA"
EXTRAPOLATION, POWER = "curve extrapolation, annealing", "curve extrapolation, power law"
SECTIONS: dict[str, dict[str, Any]] = {
    FULL: {"name": "random"},
    PROMOTION: {"name": "asha", "eta": ETA},
    HYPERBAND: {"name": "hyperband", "eta": ETA},
    EXTRAPOLATION: {"name": "extrapolation", "interval": INTERVAL, "law": "annealing"},
    POWER: {"name": "extrapolation", "interval": INTERVAL},
}


@dataclass(frozen=True, slots=True)
class Recorded:
    """The recorded curves, and what is asked of them.

    Attributes:
        curves: of each recipe.
        rates: of each recipe, the learning-rate factor of each step.
        steps: of a whole training.
    """

    curves: Sequence[Recording]
    rates: Sequence[Sequence[float]]
    steps: int

    @property
    def best(self) -> int:
        """The recipe with the lowest loss at its end."""
        return min(range(len(self.curves)), key=lambda recipe: self.curves[recipe].losses[-1])

    @property
    def target(self) -> float:
        """Its loss."""
        return self.curves[self.best].losses[-1]

    @property
    def rungs(self) -> list[int]:
        """Steps of the rungs."""
        lowest = round(LOWEST * self.steps)
        return [*(lowest * ETA**level for level in range(10) if lowest * ETA**level < self.steps), self.steps]

    @property
    def space(self) -> Space:
        """The recipes by number."""
        return Space(lambda choose: {"recipe": choose.one_of("recipe", list(range(len(self.curves))))})

    def rates_of(self, changes: Mapping[str, Any]) -> Sequence[float]:
        """Return the schedule of a recipe."""
        return self.rates[changes["recipe"]]

    def loss(self, recipe: int, step: int) -> float:
        """Return the loss after a step."""
        return self.curves[recipe].losses[step // INTERVAL - 1]

    def seconds(self, recipe: int, begin: int, end: int) -> float:
        """Return how long a segment takes, with one evaluation at its end."""
        curve = self.curves[recipe]
        return sum(curve.step_seconds[begin // INTERVAL : end // INTERVAL]) + curve.end_seconds[end // INTERVAL - 1]


@dataclass(slots=True)
class Replay:
    """How a search went.

    Attributes:
        seconds: all of it.
        reached: seconds until it had the lowest loss; 0: never.
        steps: trained in all.
        lowest: the lowest loss.
        finished: the recipes that were trained to the end.
        forecasts: of its trials.
    """

    seconds: float = 0.0
    reached: float = 0.0
    steps: int = 0
    lowest: float = math.inf
    finished: tuple[int, ...] = ()
    forecasts: Sequence[Forecast] = ()

    def arrived(self, recorded: Recorded, recipe: int, step: int, now: float) -> None:
        """Count the end of a segment."""
        self.seconds = now
        self.lowest = min(self.lowest, recorded.loss(recipe, step))
        if recorded.loss(recipe, step) <= recorded.target:
            self.reached = self.reached or now
        if step == recorded.steps:
            self.finished += (recipe,)


def engine_of(section: Mapping[str, Any], recorded: Recorded, seed: int) -> Scheduler:
    """Return a search of the recipes."""
    factory = resolve(SEARCHES, section["name"], "search.name")
    options = options_parameter(factory, SearchOptions)
    rung = {"interval": recorded.rungs[0]} if section["name"] in ("asha", "hyperband") else {}
    parsed = options.model_validate({"space": {}, "trials": len(recorded.curves), **rung, **section})
    objective = Objective("loss", "lower")
    problem = Problem(recorded.space, objective, recorded.steps, seed, 0, recorded.rates_of)
    engine: Scheduler = factory(problem, parsed)
    return engine


def replay(section: Mapping[str, Any], recorded: Recorded, seed: int) -> Replay:
    """Replay a search of ours."""
    engine, found, running, now, count = engine_of(section, recorded, seed), Replay(), [], 0.0, 0
    rows: list[Mapping[str, Any]] = []
    while True:
        for work in engine.ask(SLOTS - len(running)):
            end = now + recorded.seconds(work.changes["recipe"], work.snapshot.step, work.until)
            heapq.heappush(running, (end, count, work))
            count += 1
        rows += engine.drain()
        if not running:
            break
        now, _, work = heapq.heappop(running)
        recipe = work.changes["recipe"]
        found.steps += work.until - work.snapshot.step
        found.arrived(recorded, recipe, work.until, now)
        snapshot = Snapshot(f"{recipe} at {work.until}", work.until)
        engine.tell(Done(work.attempt, snapshot, {"loss": recorded.loss(recipe, work.until)}))
    found.forecasts = forecasts(rows)
    return found


def replay_ray(recorded: Recorded, seed: int) -> Replay:
    """Replay a search by Ray's scheduler, which stops trials and never goes on with one that was stopped."""
    rungs = recorded.rungs
    scheduler = AsyncHyperBandScheduler(
        time_attr="step", metric="loss", mode="min", max_t=recorded.steps, grace_period=rungs[0], reduction_factor=ETA
    )
    candidates = RandomSearcher(recorded.space, seed).ask(range(len(recorded.curves)))
    waiting = [each.configuration.changes["recipe"] for each in candidates]
    found, running, now = Replay(), [], 0.0
    while waiting or running:
        while waiting and len(running) < SLOTS:
            recipe = waiting.pop(0)
            trial = RayTrial("recorded", trial_id=f"{recipe}", stub=True)
            scheduler.on_trial_add(None, trial)
            heapq.heappush(running, (now + recorded.seconds(recipe, 0, rungs[0]), recipe, 0, trial))
        now, recipe, level, trial = heapq.heappop(running)
        step = rungs[level]
        found.steps += step - ([0, *rungs][level])
        found.arrived(recorded, recipe, step, now)
        decision = scheduler.on_trial_result(None, trial, {"step": step, "loss": recorded.loss(recipe, step)})
        if decision == TrialScheduler.CONTINUE:
            end = now + recorded.seconds(recipe, step, rungs[level + 1])
            heapq.heappush(running, (end, recipe, level + 1, trial))
    return found


def row_of(name: str, recorded: Recorded, replays: Sequence[Replay], full: Sequence[Replay]) -> dict[str, Any]:
    """Return a row of the table."""
    pairs = list(zip(replays, full, strict=True))
    seconds = [own.reached or own.seconds + other.reached for own, other in pairs]
    every = [forecast for own in replays for forecast in own.forecasts if forecast.end is not None]
    return {
        "search": name,
        "seconds": statistics.mean(seconds),
        "speedup": statistics.geometric_mean(other.reached / own for own, other in zip(seconds, full, strict=True)),
        "seconds_in_all": statistics.mean(own.seconds for own in replays),
        "steps": statistics.mean(own.steps for own in replays),
        "stopped_winners": sum(recorded.best not in own.finished for own in replays),
        "excess_loss": statistics.mean(own.lowest for own in replays) - recorded.target,
        "forecasts_right": statistics.mean(each.right for each in every) if every else math.nan,
        "seconds_of_seeds": seconds,
    }


def measure(recorded: Recorded) -> list[dict[str, Any]]:
    """Return the table."""
    runs: dict[str, Callable[[int], Replay]] = {
        **{name: lambda seed, section=section: replay(section, recorded, seed) for name, section in SECTIONS.items()},
        RAY: lambda seed: replay_ray(recorded, seed),
    }
    replays = {name: [run(seed) for seed in range(SEEDS)] for name, run in runs.items()}
    return [row_of(name, recorded, found, replays[FULL]) for name, found in replays.items()]


def headline_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures by which the searches are judged."""
    named = {row["search"]: row for row in rows}
    return {
        "promotion_over_full": named[PROMOTION]["speedup"],
        "promotion_over_ray_asha": named[PROMOTION]["speedup"] / named[RAY]["speedup"],
        "extrapolation_over_full": named[EXTRAPOLATION]["speedup"],
        "stopped_winners": named[EXTRAPOLATION]["stopped_winners"],
        "stopped_winners_power_law": named[POWER]["stopped_winners"],
        "stopped_winners_promotion": named[PROMOTION]["stopped_winners"],
        "stopped_winners_ray_asha": named[RAY]["stopped_winners"],
        "seeds": SEEDS,
    }


def record_all(data: Path, file: Path, count: int, steps: int) -> Recorded:
    """Return the curves, of which those that are missing are trained."""
    base, curves = base_recipe(data, steps), recordings(file, data, count, steps)
    factors = [base.with_overrides(curve.changes).schedule.factor(steps) for curve in curves]
    return Recorded(curves, [[factor(step) for step in range(steps)] for factor in factors], steps)


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--curves", type=Path, help="file of the recorded curves")
    options = parse(parser)
    torch.set_num_threads(1)
    count, steps = (QUICK_RECIPES, QUICK_STEPS) if options.quick else (RECIPES, STEPS)
    file = options.curves or RESULTS / f"multifidelity-curves{'-quick' if options.quick else ''}.jsonl"
    recorded = record_all(options.data, file, count, steps)
    rows = measure(recorded)
    finish("multifidelity", rows, headline_of(rows), options)


if __name__ == "__main__":
    main()
