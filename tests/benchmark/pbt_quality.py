"""What population based training finds, beside random search, ASHA and Optuna's TPE with the same number of steps.

    python tests/benchmark/pbt_quality.py

16 classifiers of scikit-learn's digits (64-32-10, batch 16, 400 steps) for each method: 6,400 steps in all. The best
model on the validation split is judged by its loss on the test split, which no method sees. Others than PBT also search
the schedule: its shape, floor and warm-up. PBT trains at the rates that it finds.

(a) 30 % of the training labels are wrong; SGD with momentum. (b) Clean labels; AdamW. (c) The steps that a machine with
16 slots takes one after the other until PBT is as good as TPE in the end, beside TPE with 1, 4 and 16 trials at once.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from bench import finish, parse, parser_of
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from raytrain.errors import TrainingError
from raytrain.optim import schedules
from raytrain.optim.schedules import lr_factor
from raytrain.serialization import pack, unpack
from search.pbt.engine import PopulationBasedTraining
from search.pbt.options import PBTOptions
from search.rng import keyed_generator
from search.scheduling.driver import SegmentEnd, run_attempt
from search.scheduling.scheduler import Problem, Scheduler
from search.scheduling.segments import Objective
from search.scheduling.work import Work
from search.space import make_space
from search.sweep.options import ASHAOptions, SweepOptions
from search.sweep.searches import asha, random, tpe
from search.testing import MemoryStates

MEMBERS, STEPS, INTERVAL, BATCH, WRONG = 16, 400, 20, 16, 0.3
SIZES = (64, 32, 10)
OTHERS = ("random", "asha", "tpe")

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


@dataclass(frozen=True)
class Digits:
    """The splits: (inputs, labels) each."""

    train: tuple[torch.Tensor, torch.Tensor]
    valid: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]


def load(seed: int, wrong: float) -> Digits:
    """Return splits of half, a quarter and a quarter of the digits, with some wrong labels in the first."""
    digits = load_digits()
    rng = keyed_generator(seed, "split")
    order = rng.permutation(len(digits.target))
    inputs = torch.tensor(digits.data[order] / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target[order], dtype=torch.long)
    half, quarter = len(order) // 2, len(order) // 4
    noisy = labels[:half].clone()
    chosen = torch.tensor(rng.random(half) < wrong)
    noisy[chosen] = torch.tensor(rng.integers(0, 10, half), dtype=torch.long)[chosen]
    valid, test = slice(half, half + quarter), slice(half + quarter, None)
    return Digits((inputs[:half], noisy), (inputs[valid], labels[valid]), (inputs[test], labels[test]))


class Trainer:
    """Trains segments in this process.

    Args:
        digits: the data.
        adam: take AdamW in place of SGD with momentum.

    Attributes:
        tests: row of a segment -> test loss at its end.
    """

    def __init__(self, digits: Digits, *, adam: bool) -> None:
        self.tests: dict[int, float] = {}
        self._digits, self._adam = digits, adam

    def __call__(self, work: Work, packed: bytes | None) -> SegmentEnd:
        """Train a segment."""
        weights, moments = self._start(work, packed)
        inputs, labels = self._digits.train
        for step in range(work.snapshot.step, work.until):
            rng = np.random.default_rng((work.seed, step))
            taken = torch.from_numpy(rng.integers(0, len(labels), BATCH))
            kept = 1.0 - work.changes["dropout"]
            mask = torch.from_numpy((rng.random((BATCH, SIZES[1])) < kept).astype(np.float32)) / kept
            loss = cross_entropy(_forward(weights, inputs[taken], mask), labels[taken])
            if not math.isfinite(loss.item()):
                raise TrainingError(f"the loss is {loss.item()}")
            self._update(weights, moments, torch.autograd.grad(loss, weights), work.changes, step)
        with torch.no_grad():
            valid, test = (
                cross_entropy(_forward(weights, split[0]), split[1]).item()
                for split in (self._digits.valid, self._digits.test)
            )
        self.tests[work.row] = test
        state = {"weights": [one.detach() for one in weights], "moments": moments}
        return SegmentEnd(pack(state), work.until, {"loss": valid})

    def _start(self, work: Work, packed: bytes | None) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        if packed is not None:
            state = unpack(packed)
            return [one.clone().requires_grad_() for one in state["weights"]], [list(m) for m in state["moments"]]
        torch.manual_seed(work.seed)
        weights = []
        for inner, outer in zip(SIZES, SIZES[1:], strict=False):
            bound = 1 / math.sqrt(inner)
            weights += [torch.empty(outer, inner).uniform_(-bound, bound), torch.empty(outer).uniform_(-bound, bound)]
        zeros = [[torch.zeros_like(one) for one in weights] for _ in range(2 if self._adam else 1)]
        return [one.requires_grad_() for one in weights], zeros

    @torch.no_grad()
    def _update(
        self, weights: Any, moments: list[list[torch.Tensor]], gradients: Any, values: Mapping[str, Any], step: int
    ) -> None:
        lr = values["lr"] * _factor(values, step)
        decay = values["weight_decay"]
        if not self._adam:
            torch._foreach_mul_(moments[0], values["momentum"])
            torch._foreach_add_(moments[0], torch._foreach_add(gradients, weights, alpha=decay))
            torch._foreach_add_(weights, moments[0], alpha=-lr)
            return
        lr *= 0.1  # so that both optimizers have a range around their usual rates
        torch._foreach_lerp_(moments[0], list(gradients), 0.1)
        torch._foreach_lerp_(moments[1], torch._foreach_mul(gradients, gradients), 0.001)
        torch._foreach_mul_(weights, 1 - lr * decay)
        root = torch._foreach_sqrt(moments[1])
        torch._foreach_div_(root, math.sqrt(1 - 0.999 ** (step + 1)))
        torch._foreach_add_(root, 1e-8)
        torch._foreach_addcdiv_(weights, moments[0], root, value=-lr / (1 - 0.9 ** (step + 1)))


def _forward(weights: Any, inputs: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    hidden = torch.relu(torch.addmm(weights[1], inputs, weights[0].T))
    return torch.addmm(weights[3], hidden if mask is None else hidden * mask, weights[2].T)


def _factor(values: Mapping[str, Any], step: int) -> float:
    """Return the factor of the learning rate of methods that search its schedule."""
    if "shape" not in values:
        return 1.0
    shape = getattr(schedules, values["shape"])
    about = {"warmup": values["warmup"], "min_lr_ratio": values["floor"], "decay_ratio": 0.2}
    return lr_factor(shape, step, steps=STEPS, **about)


def engine_of(method: str, seed: int, adam: bool) -> Scheduler:
    """Return the engine of a method, with its space and budget."""
    own = COMMON if adam else {**COMMON, **MOMENTUM}
    table = own if method not in OTHERS else {**own, **SCHEDULE}
    problem = Problem(make_space(table), Objective("loss", "lower"), STEPS, seed, seed)
    section = {"space": table, "name": method}
    if method not in OTHERS:
        section |= {"name": "pbt", "population": MEMBERS, "interval": INTERVAL, "exploit": method}
        return PopulationBasedTraining(problem, PBTOptions.model_validate(section))
    if method == "asha":
        more = {"interval": 50, "eta": 2, "trials": 10_000, "total_steps": MEMBERS * STEPS}
        return asha(problem, ASHAOptions.model_validate({**section, **more}))
    options = SweepOptions.model_validate({**section, "trials": MEMBERS})
    return {"random": random, "tpe": tpe}[method](problem, options)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        test: loss of the best model on the test split.
        valid: on the validation split.
        curve: (steps that a machine with enough slots takes one after the other, best validation loss by then).
    """

    test: float
    valid: float
    curve: tuple[tuple[int, float], ...]


def find(method: str, seed: int, *, adam: bool, outstanding: int = 1) -> Found:
    """Run a search with a fixed number of concurrent segments."""
    engine, states = engine_of(method, seed, adam), MemoryStates()
    train = Trainer(load(seed, 0.0 if adam else WRONG), adam=adam)
    clock, curve = 0, []
    while works := engine.ask(outstanding):
        for work in works:
            engine.tell(run_attempt(work, states, train))
        clock += max(work.until - work.snapshot.step for work in works)
        if engine.best:
            curve.append((clock, engine.best.score))
    best = engine.best
    if best is None:
        raise RuntimeError(f"{method} found nothing")
    return Found(train.tests[best.segment.row], best.score, tuple(curve))


def gain(pbt: list[Found], other: list[Found]) -> tuple[float, float]:
    """Return by how much PBT's test loss is lower, and the half width of its 95 % interval, over paired seeds."""
    gains = [theirs.test - ours.test for ours, theirs in zip(pbt, other, strict=True)]
    return statistics.mean(gains), 1.96 * statistics.stdev(gains) / math.sqrt(len(gains))


def steps_to(found: Found, valid: float) -> float:
    """Return after how many steps a search is as good; those of all of it, if it never is."""
    return next((float(clock) for clock, best in found.curve if best <= valid), float(found.curve[-1][0]))


def main() -> None:
    """Measure and report."""
    options = parse(parser_of(__doc__.partition("\n")[0]))
    torch.set_num_threads(1)
    seeds = range(2 if options.quick else 20)
    rules = ["truncation"] if options.quick else ["truncation", "tournament", "welch", "mf-pbt"]
    rows: list[dict[str, Any]] = []
    found: dict[tuple[str, bool], list[Found]] = {}
    for adam in (False, True):
        for method in [*rules, *OTHERS]:
            slots = MEMBERS if method not in OTHERS else 1
            each = found[method, adam] = [find(method, seed, adam=adam, outstanding=slots) for seed in seeds]
            tests = [one.test for one in each]
            about = {"labels": "clean" if adam else "30 % wrong", "method": method}
            rows.append({**about, "test_loss": statistics.mean(tests), "deviation": statistics.stdev(tests)})
            print(rows[-1], flush=True)
    headline: dict[str, float] = {}
    for other in OTHERS:
        headline[f"pbt_minus_{other}"], headline[f"half_width_95_{other}"] = gain(
            found["truncation", False], found[other, False]
        )
    clean = {method: [one.test for one in found[method, True]] for method in ("truncation", *OTHERS)}
    best = min(OTHERS, key=lambda method: statistics.mean(clean[method]))
    headline["plain_pbt_over_best"] = statistics.mean(clean["truncation"]) / statistics.mean(clean[best])
    headline["spread_best_over_pbt"] = statistics.stdev(clean[best]) / statistics.stdev(clean["truncation"])
    for outstanding in (1, 4, 16):
        each = [find("tpe", seed, adam=False, outstanding=outstanding) for seed in seeds]
        ratios = [
            steps_to(theirs, theirs.valid) / steps_to(ours, theirs.valid)
            for ours, theirs in zip(found["truncation", False], each, strict=True)
        ]
        headline[f"wall_time_tpe_{outstanding}_over_pbt"] = statistics.median(ratios)
    finish("pbt_quality", rows, headline, options)


if __name__ == "__main__":
    main()
