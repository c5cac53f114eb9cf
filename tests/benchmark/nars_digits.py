"""Architecture and recipe of a digit classifier: searched jointly by NARS, beside four other ways with equal steps.

    python tests/benchmark/nars_digits.py

CNNs of at most 30,000 parameters, as the shipped one, and their recipes, each trained for 100 steps; every search has
24 trials, or 10 with --quick. A third of the images is held out from all searches: the model with the least loss on the
validation split is judged by its loss there. Beside NARS: random search of the same space; NARS over the recipe of the
shipped network, then over the network with the best recipe, half of the trials each; the shipped recipe, for the steps
of one trial; and Optuna's TPE.

The headline has by how much the loss of NARS is lower, a mean over seeds, with the half width of its 95 % interval.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing import get_context
from typing import Any, Literal

import torch
from bench import finish, parse, parser_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raytrain.recipe import read_toml
from raytrain.tasks.digits import digits
from raytrain.tasks.options import DigitsOptions
from raytrain.tasks.task import Task
from raytrain.training.kind import KIND
from raytrain.training.recipe import TrainRecipe
from search.chooser import Chooser
from search.launch.trial import Trial
from search.limits import Limit
from search.model_statistics import ModelStatistics
from search.scheduling.work import Snapshot, Work
from search.searcher import Candidate, CandidateResult, Searcher
from search.searchers.nars import NARSSearcher
from search.searchers.random import RandomSearcher
from search.searchers.tpe import TPESearcher
from search.space import Space
from search.spaces.digits import cnn

TRIALS, QUICK_TRIALS = 24, 10
STEPS, PARAMETERS = 100, 30_000
TEST, VALID = 1 / 3, 1 / 4
"""Share of the images that no search sees, and of the rest, the share that searches choose by."""
OTHERS = ("random", "sequential", "default", "tpe")
SEARCHERS = {"nars": NARSSearcher, "random": RandomSearcher, "tpe": TPESearcher}


@dataclass(frozen=True)
class Split:
    """Images by their place in a split of the task, each with whether it is of the test third."""

    images: Sequence[tuple[Tensor, Tensor]]
    test: Sequence[bool]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, bool]:
        """Return (image, label, whether of the test third)."""
        return (*self.images[index], self.test[index])


@cache
def _splits() -> dict[str, Split]:
    whole = digits(DigitsOptions(name="digits", valid=TEST))
    rest, test = whole.data("train"), whole.data("valid")
    count = math.ceil(VALID * len(rest))
    valid = [rest[place] for place in range(count)]  # the task has shuffled them
    train = [rest[place] for place in range(count, len(rest))]
    held_out = valid + [test[place] for place in range(len(test))]
    return {
        "train": Split(train, [False] * len(train)),
        "valid": Split(held_out, [place >= count for place in range(len(held_out))]),
    }


def task(options: DigitsOptions) -> Task:
    """Return the digits in three splits; "test_loss" is that of the third which is held out."""

    def data(split: Literal["train", "valid"]) -> Split:
        return _splits()[split]

    return replace(digits(options), data=data, losses=_losses, measure=_measure, metric="loss", better="lower")


def _losses(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    images, labels, _ = batch
    return cross_entropy(model(images), labels, reduction="none")


def _measure(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, tuple[float, float]]:
    losses, test = _losses(model, batch).double(), batch[2]
    return {
        "loss": (float(losses[~test].sum()), float((~test).sum())),
        "test_loss": (float(losses[test].sum()), float(test.sum())),
    }


@dataclass
class Training:
    """Trains candidates of one seed.

    Attributes:
        seed: of weights, data order and searchers.
        spent: steps so far.
    """

    seed: int
    spent: int = 0
    base: TrainRecipe = field(init=False)

    def __post_init__(self) -> None:
        """Read the shipped recipe."""
        raw, _ = read_toml("digits", [KIND.recipes])
        shipped = TrainRecipe.parse({"name": "digits", **raw})
        self.base = shipped.with_overrides({"steps": STEPS, "seed": self.seed, "task.name": "nars_digits:task"})
        self._trial = Trial(self.base, torch.device("cpu"), lambda step: None)

    def train(self, changes: Mapping[str, Any]) -> dict[str, float]:
        """Return the metrics of a whole training."""
        self.spent += STEPS
        work = Work("", 0, 0, Snapshot(), STEPS, changes, self.seed)
        return dict(self._trial.train(work, None).metrics)


@dataclass(frozen=True)
class Best:
    """The best candidate of a search: its losses and its decisions."""

    valid: float
    test: float
    values: Mapping[str, Any]


def search(training: Training, searcher: Searcher, trials: int) -> Best:
    """Return the best of some trials."""
    best = Best(math.inf, math.inf, {})
    for number in range(trials):
        candidates = searcher.ask([number])
        for candidate in candidates:
            found = training.train(candidate.configuration.changes)
            best = min(best, _best(found, candidate), key=lambda each: each.valid)
            searcher.tell([CandidateResult(candidate, -found["loss"])])
    return best


def _best(found: Mapping[str, float], candidate: Candidate) -> Best:
    return Best(found["loss"], found["test_loss"], candidate.configuration.genome.values())


def joint(training: Training, name: str, trials: int) -> float:
    """Return the test loss of what one searcher finds in the whole space."""
    return search(training, SEARCHERS[name](limited(training, cnn), training.seed), trials).test


def sequential(training: Training, trials: int) -> float:
    """Return the test loss of the best network for the best recipe of the default network."""
    default = {"layers": 2, "width0": 32, "width1": 64, "norm": "batch", "depth": 1}
    recipes = limited(training, partial(_fixed, default, False))
    recipe = search(training, NARSSearcher(recipes, training.seed), trials // 2)
    networks = limited(training, partial(_fixed, {**default, **recipe.values}, True))
    network = search(training, NARSSearcher(networks, training.seed), trials - trials // 2)
    return min(recipe, network, key=lambda each: each.valid).test


def limited(training: Training, program: Callable[[Chooser], dict[str, Any]]) -> Space:
    """Return a space within the limit."""
    count = partial(ModelStatistics(training.base).measure, "parameters")
    return Space(program).limited(Limit("parameters", PARAMETERS, count))


ARCHITECTURE = ("layers", "width", "norm", "depth")


class _Half(Chooser):
    """Decides on the network or on the recipe alone; the rest has known values."""

    def __init__(self, whole: Chooser, known: Mapping[str, Any], network: bool) -> None:
        super().__init__(whole.decide)
        self._known_values, self._network, self._whole = known, network, whole

    def decide(self, name: str, domain: Any) -> Any:
        """Return the known value of a decision of the other half."""
        if name.startswith(ARCHITECTURE) is self._network:
            return self._whole.decide(name, domain)
        return self._known_values[name]


def _fixed(known: Mapping[str, Any], network: bool, choose: Chooser) -> dict[str, Any]:
    return cnn(_Half(choose, known, network))


def measure(seed: int, trials: int) -> dict[str, float]:
    """Return the test loss of each way, computed on one thread."""
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    for name in ("nars", *OTHERS):
        training, began = Training(seed), time.perf_counter()
        if name == "default":
            found[name] = training.train({})["test_loss"]
        else:
            found[name] = sequential(training, trials) if name == "sequential" else joint(training, name, trials)
            if training.spent != trials * STEPS:
                raise SystemExit(f"{name} took {training.spent} steps, and not {trials * STEPS}")
        print(f"seed {seed}, {name}: {found[name]:.4f} after {time.perf_counter() - began:.0f} s", flush=True)
    return found


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, help="seeds of each way [default: 10; 2 with --quick]")
    options = parse(parser)
    seeds = range(options.seeds or (2 if options.quick else 10))
    with get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        each = pool.map(partial(measure, trials=QUICK_TRIALS if options.quick else TRIALS), seeds, chunksize=1)
    rows = []
    for name in ("nars", *OTHERS):
        losses = [one[name] for one in each]
        rows.append({"way": name, "test_loss": statistics.mean(losses), "deviation": statistics.stdev(losses)})
    headline: dict[str, float] = {}
    for other in OTHERS:
        gains = [one[other] - one["nars"] for one in each]
        headline[f"nars_minus_{other}"] = statistics.mean(gains)
        headline[f"nars_minus_{other}_half_width_95"] = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains))
    finish("nars_digits", rows, headline, options)


if __name__ == "__main__":
    main()
