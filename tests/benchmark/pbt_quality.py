"""What population based training finds, beside random search, ASHA and Optuna's TPE with the same number of steps.

    python tests/benchmark/pbt_quality.py

16 classifiers of scikit-learn's digits (64-32-10, batch 16, 400 steps) for each method: 6,400 steps in all. The best
model on the validation split is judged by its loss on the test split, which no method sees. Others than PBT also search
the schedule: its shape, floor and warm-up. PBT trains at the rates that it finds.

(a) 30 % of the training labels are wrong; SGD with momentum. (b) Clean labels; AdamW. (c) The steps that a machine with
16 slots takes one after the other until PBT is as good as TPE in the end, beside TPE with 1, 4 and 16 trials at once.
The searches of all seeds run side by side, and what they train at one time is one stack of models.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bench import finish, parse, parser_of
from digit_stack import STEPS, Layer, StackTrainer, load

from search.pbt.engine import PopulationBasedTraining
from search.pbt.options import PBTOptions
from search.scheduling.driver import SegmentEnd, outcome_of
from search.scheduling.scheduler import Problem, Scheduler
from search.scheduling.segments import Objective
from search.scheduling.work import Failed, Work
from search.space import make_space
from search.sweep.options import ASHAOptions, SweepOptions
from search.sweep.searches import asha, random, tpe
from search.testing import MemoryStates

MEMBERS, INTERVAL, WRONG = 16, 20, 0.3
RULES: dict[str, dict[str, Any]] = {
    "truncation": {"exploit": "truncation"},
    "truncation, bottom 0.4": {"exploit": {"name": "truncation", "bottom": 0.4}},
    "tournament": {"exploit": "tournament"},
    "welch": {"exploit": "welch"},
    "mf-pbt": {"exploit": "mf-pbt"},
}
OTHERS = ("random", "asha", "tpe")
PBT = "truncation"

COMMON = {
    "lr": {"type": "float", "low": 1e-3, "high": 1.0, "scale": "log"},
    "weight_decay": {"type": "float", "low": 1e-5, "high": 0.3, "scale": "log"},
    "dropout": {"type": "float", "low": 0.0, "high": 0.5, "step": 0.05},
}
MOMENTUM = {"momentum": {"type": "float", "low": 0.5, "high": 0.99, "scale": "one-minus"}}
SCHEDULE = {
    "shape": {"type": "choice", "values": ["constant", "linear", "cosine"]},
    "floor": {"type": "float", "low": 0.0, "high": 0.5},
    "warmup": {"type": "int", "low": 0, "high": 100},
}


def engine_of(method: str, seed: int, adam: bool) -> Scheduler:
    """Return the engine of a method, with its space and budget."""
    own = COMMON if adam else {**COMMON, **MOMENTUM}
    table = own if method in RULES else {**own, **SCHEDULE}
    problem = Problem(make_space(table), Objective("loss", "lower"), STEPS, seed, seed)
    section: dict[str, Any] = {"space": table, "name": method}
    if method in RULES:
        section |= {"name": "pbt", "population": MEMBERS, "interval": INTERVAL, **RULES[method]}
        return PopulationBasedTraining(problem, PBTOptions.model_validate(section))
    if method == "asha":
        more = {"interval": 50, "eta": 2, "trials": 10_000, "total_steps": MEMBERS * STEPS}
        return asha(problem, ASHAOptions.model_validate({**section, **more}))
    options = SweepOptions.model_validate({**section, "trials": MEMBERS})
    return {"random": random, "tpe": tpe}[method](problem, options)


@dataclass
class Search:
    """A search of one seed.

    Attributes:
        engine: of the method.
        states: of its members.
        tests: row of a segment -> loss at its end on the test split.
        clock: steps that a machine with enough slots has taken one after the other.
        curve: (clock, best validation loss by then).
    """

    engine: Scheduler
    states: MemoryStates = field(default_factory=MemoryStates)
    tests: dict[int, float] = field(default_factory=dict)
    clock: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)

    def tell(self, works: Sequence[Work], ends: Sequence[SegmentEnd | Failed]) -> None:
        """Learn how the segments have ended that were asked for together."""
        for work, end in zip(works, ends, strict=True):
            if isinstance(end, SegmentEnd):
                self.tests[work.row] = end.metrics["test"]
            self.engine.tell(outcome_of(work, self.states, end))
        self.clock += max(work.until - work.snapshot.step for work in works)
        if self.engine.best:
            self.curve.append((self.clock, self.engine.best.score))
        needed = self.engine.digests()
        self.states.states = {digest: state for digest, state in self.states.states.items() if digest in needed}

    @property
    def test(self) -> float:
        """Loss of the best model on the test split."""
        if self.engine.best is None:
            raise RuntimeError("the search has found nothing")
        return self.tests[self.engine.best.segment.row]

    @property
    def valid(self) -> float:
        """Its loss on the validation split."""
        return self.curve[-1][1]

    def steps_to(self, valid: float) -> int:
        """Return after how many steps it is as good; all that it took, if it never is."""
        return next((clock for clock, best in self.curve if best <= valid), self.clock)


def find(method: str, seeds: Sequence[int], *, adam: bool, outstanding: int) -> list[Search]:
    """Run a search for each seed, with a number of segments that are under way at once."""
    searches = [Search(engine_of(method, seed, adam)) for seed in seeds]
    trainer = StackTrainer([load(seed, 0.0 if adam else WRONG) for seed in seeds], adam=adam)
    while asked := [(place, works) for place, one in enumerate(searches) if (works := one.engine.ask(outstanding))]:
        stacks: dict[tuple[int, int], list[Layer]] = {}
        for place, works in asked:
            for work in works:
                state = searches[place].states.get(work.snapshot.digest) if work.snapshot.digest else None
                stacks.setdefault((work.snapshot.step, work.until), []).append(Layer(place, work, state))
        ends = {
            (layer.search, layer.work.attempt): end
            for layers in stacks.values()
            for layer, end in zip(layers, trainer.train(layers), strict=True)
        }
        for place, works in asked:
            searches[place].tell(works, [ends[place, work.attempt] for work in works])
    return searches


def gain(pbt: Sequence[Search], other: Sequence[Search]) -> tuple[float, float]:
    """Return by how much PBT's test loss is lower, and the half width of its 95 % interval, over paired seeds."""
    gains = [theirs.test - ours.test for ours, theirs in zip(pbt, other, strict=True)]
    return statistics.mean(gains), 1.96 * statistics.stdev(gains) / math.sqrt(len(gains))


def headline_of(found: dict[tuple[str, bool], list[Search]], seeds: Sequence[int]) -> dict[str, float]:
    """Return the figures of (a), (b) and (c)."""
    headline: dict[str, float] = {}
    for adam, labels in ((False, ""), (True, "clean_")):
        for other in OTHERS:
            key = f"{labels}pbt_minus_{other}"
            headline[key], headline[f"{key}_half_width_95"] = gain(found[PBT, adam], found[other, adam])
    clean = {method: [one.test for one in found[method, True]] for method in (PBT, *OTHERS)}
    best = min(OTHERS, key=lambda method: statistics.mean(clean[method]))
    headline["plain_pbt_over_best"] = statistics.mean(clean[PBT]) / statistics.mean(clean[best])
    headline["spread_best_over_pbt"] = statistics.stdev(clean[best]) / statistics.stdev(clean[PBT])
    for outstanding in (1, 4, 16):
        one = outstanding == 1
        each = found["tpe", False] if one else find("tpe", seeds, adam=False, outstanding=outstanding)
        pairs = zip(found[PBT, False], each, strict=True)
        ratios = [theirs.steps_to(theirs.valid) / ours.steps_to(theirs.valid) for ours, theirs in pairs]
        headline[f"wall_time_tpe_{outstanding}_over_pbt"] = statistics.median(ratios)
    return headline


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, help="searches of each method; by default 20, or 10 with --quick")
    options = parse(parser)
    torch.set_num_threads(1)
    seeds = range(options.seeds or (10 if options.quick else 20))
    rules = (PBT,) if options.quick else tuple(RULES)
    rows: list[dict[str, Any]] = []
    found: dict[tuple[str, bool], list[Search]] = {}
    for adam in (False, True):
        for method in (*rules, *OTHERS):
            slots = MEMBERS if method in (*RULES, "random") else 1
            each = found[method, adam] = find(method, seeds, adam=adam, outstanding=slots)
            tests = [one.test for one in each]
            about = {"labels": "clean" if adam else "30 % wrong", "method": method, "seeds": len(seeds)}
            rows.append({**about, "test_loss": statistics.mean(tests), "deviation": statistics.stdev(tests)})
            print(rows[-1], flush=True)
    finish("pbt_quality", rows, headline_of(found, seeds), options)


if __name__ == "__main__":
    main()
