"""How many evaluations each searcher takes on the HPOLib tables: a joint search of architecture and training recipe.

A search chooses by one stored training run of each configuration (the seed's remainder by their number), and is judged
by the mean of the others. Its figure is the number of evaluations until the chosen configuration is as good as the
median of random search after 500 evaluations; the headline is the geometric mean over the four tables of the median
over seeds. NAS-Bench-Macro is a fifth table, beside that mean: it has architectures alone, trained by one recipe. Three
runs of a good one differ by as much as the best ones do, so there the mean of the three is what is told and judged.
Peers are Optuna's samplers, and SMAC where it is installed (`pip install -c constraints.txt smac`), as their users call
them. HEBO is left out: 0.3.2, which is what installs beside our pins, imports `pymoo.factory`, which pymoo has no more.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hpolib
import nas_bench_macro
import numpy as np
import optuna
from bench import finish, parse, parser_of
from hpolib import check_data, losses_of, row_of, space

from raytrain.registry import resolve
from search.chooser import Chooser
from search.searcher import Candidate, CandidateResult, Searcher
from search.searchers.gp import GaussianProcessSearcher
from search.space import Space
from search.tables import SEARCHERS

TARGETS = {
    "slice_localization": 2.99e-4,
    "protein_structure": 0.235,
    "naval_propulsion": 5.88e-5,
    "parkinsons_telemonitoring": 0.0111,
}
"""The exact median of the best of 500 random configurations of each table."""
TITLES = [name.partition("_")[0] for name in TARGETS]
MACRO_TARGET = 6.977
"""Likewise, in percent."""
BUDGET = 200
PRIOR_RESULTS = 400
OURS = ("gp", "nars", "tpe", "evolution", "mcts", "sobol", "random")

Ask = Callable[[int], tuple[int, Callable[[float], None]]]
"""Number -> (row of the table, what to call with its loss)."""


@dataclass(frozen=True)
class Table:
    """What is searched.

    Attributes:
        name: of its file.
        data: folder of the data sets.
        space: its configurations.
        dimensions: field -> values.
        unordered: the fields whose values have no order.
        row_of: configuration -> row.
        losses: shape (configurations, stored runs); of one run it is what is told and judged.
        target: the loss to reach.
    """

    name: str
    data: Path
    space: Callable[[Chooser], dict[str, Any]]
    dimensions: Mapping[str, tuple[Any, ...]]
    unordered: Collection[str]
    row_of: Callable[[dict[str, Any]], int]
    losses: np.ndarray[Any, Any]
    target: float

    @property
    def title(self) -> str:
        """Its first word."""
        return self.name.partition("_")[0]


def tables_in(data: Path) -> list[Table]:
    """Return the four tables of HPOLib, and NAS-Bench-Macro if it is there."""
    found = [
        Table(name, data, space, hpolib.DIMENSIONS, hpolib.UNORDERED, row_of, losses_of(name, data), target)
        for name, target in TARGETS.items()
    ]
    if not (data / nas_bench_macro.FILE).is_file():
        print(f"without NAS-Bench-Macro: there is no {data / nas_bench_macro.FILE}", flush=True)
        return found
    blocks, errors = nas_bench_macro.DIMENSIONS, nas_bench_macro.errors(data)
    own = (nas_bench_macro.space, blocks, blocks, nas_bench_macro.row_of, errors)
    return [*found, Table("macro", data, *own, MACRO_TARGET)]


@dataclass(frozen=True)
class Search:
    """One search of a table."""

    table: Table
    seed: int


def ours(name: str, search: Search) -> Ask:
    """Return one of our searchers."""
    return asking(resolve(SEARCHERS, name, "searcher")(Space(search.table.space), search.seed), search.table)


def asking(searcher: Searcher, table: Table) -> Ask:
    """Return how to ask a searcher of ours."""

    def ask(number: int) -> tuple[int, Callable[[float], None]]:
        [candidate] = searcher.ask([number])
        return table.row_of(dict(candidate.configuration.changes)), lambda loss: searcher.tell(
            [CandidateResult(candidate, -loss)]
        )

    return ask


def earlier(table: str, data: Path, seed: int, *, wrong: bool) -> list[list[CandidateResult]]:
    """Return random search's results on each of the other tables; wrong: each result under another configuration."""
    found = []
    for other in sorted(TARGETS.keys() - {table}):
        rng = np.random.default_rng([seed, len(found)])
        points = [Space(space).sample(rng) for _ in range(PRIOR_RESULTS)]
        losses = losses_of(other, data)[[row_of(dict(point.changes)) for point in points], seed % 4]
        if wrong:
            rng.shuffle(losses)
        pairs = enumerate(zip(points, losses.tolist(), strict=True))
        results = [CandidateResult(Candidate(number, point), -loss) for number, (point, loss) in pairs]
        found.append(results)
    return found


def optunas(sampler: optuna.samplers.BaseSampler, table: Table) -> Ask:
    """Return a sampler of Optuna's."""
    study = optuna.create_study(sampler=sampler)

    def ask(_: int) -> tuple[int, Callable[[float], None]]:
        trial = study.ask()
        changes = {}
        for name, values in table.dimensions.items():
            if name in table.unordered:
                changes[name] = trial.suggest_categorical(name, values)
            else:
                changes[name] = values[trial.suggest_int(name, 0, len(values) - 1)]
        return table.row_of(changes), lambda loss: study.tell(trial, float(np.log(loss)))

    return ask


def smac(search: Search) -> Ask:
    """Return SMAC's facade for hyperparameters: a random forest on log losses, and expected improvement."""
    from ConfigSpace import CategoricalHyperparameter, ConfigurationSpace, UniformIntegerHyperparameter
    from smac import HyperparameterOptimizationFacade, Scenario
    from smac.runhistory import TrialValue

    table, places = search.table, ConfigurationSpace(seed=search.seed)
    for name, values in table.dimensions.items():
        listed = name in table.unordered
        bounds = (list(range(len(values))),) if listed else (0, len(values) - 1)
        places.add((CategoricalHyperparameter if listed else UniformIntegerHyperparameter)(name, *bounds))
    folder = Path(tempfile.mkdtemp())  # it writes its history, which nobody reads here
    scenario = Scenario(places, deterministic=True, n_trials=BUDGET, seed=search.seed, output_directory=folder)
    optimiser = HyperparameterOptimizationFacade(scenario, lambda config, seed=0: 0.0, overwrite=True, logging_level=40)

    def ask(_: int) -> tuple[int, Callable[[float], None]]:
        trial = optimiser.ask()
        changes = {name: values[int(trial.config[name])] for name, values in table.dimensions.items()}
        return table.row_of(changes), lambda loss: optimiser.tell(trial, TrialValue(cost=loss))

    return ask


def with_prior(search: Search, *, wrong: bool = False) -> Ask:
    """Return our Gaussian process with the other tables as priors."""
    priors = earlier(search.table.name, search.table.data, search.seed, wrong=wrong)
    return asking(GaussianProcessSearcher(Space(space), search.seed, priors), search.table)


SEARCHES: dict[str, Callable[[Search], Ask]] = {
    **{name: partial(ours, name) for name in OURS},
    "gp with prior": with_prior,
    "gp with wrong prior": partial(with_prior, wrong=True),
    "Optuna TPE": lambda search: optunas(
        optuna.samplers.TPESampler(seed=search.seed, multivariate=True, group=True), search.table
    ),
    "Optuna GP": lambda search: optunas(optuna.samplers.GPSampler(seed=search.seed), search.table),
    **({"SMAC": smac} if find_spec("smac") else {}),
}
PEERS = ("Optuna TPE", "Optuna GP", "SMAC")


def evaluations(ask: Ask, table: Table, seed: int) -> tuple[int, float]:
    """Return the evaluations to the target, BUDGET + 1 if it was missed, and the seconds of an ask and a tell."""
    losses, runs = table.losses, table.losses.shape[1]
    column = seed % runs
    others = [place for place in range(runs) if place != column] or [column]
    best, chosen, began = np.inf, 0, time.process_time()
    for number in range(BUDGET):
        row, tell = ask(number)
        loss = float(losses[row, column])
        tell(loss)
        if loss < best:
            best, chosen = loss, row
        if losses[chosen, others].mean() <= table.target:
            return number + 1, (time.process_time() - began) / (number + 1)
    return BUDGET + 1, (time.process_time() - began) / BUDGET


def measure(name: str, tables: Sequence[Table], seeds: Sequence[int]) -> dict[str, Any]:
    """Return a row; a prior is of other tables of the same space."""
    medians: dict[str, float] = {}
    seconds: list[float] = []
    for table in tables:
        if table.name not in TARGETS and name.endswith("prior"):
            continue
        counts = [evaluations(SEARCHES[name](Search(table, seed)), table, seed) for seed in seeds]
        medians[table.title] = statistics.median(count for count, _ in counts)
        seconds += [each for _, each in counts]
    of_hpolib = [medians[table.title] for table in tables if table.name in TARGETS]
    means = {"mean": round(statistics.geometric_mean(of_hpolib), 1)} if of_hpolib else {}
    return {"searcher": name, **medians, **means, "seconds": statistics.mean(seconds)}


def seconds_of_a_late_ask(data: Path) -> float:
    """Return the processor time of one proposal of the Gaussian process at 200 results."""
    searcher, losses = GaussianProcessSearcher(Space(space), 0), losses_of("protein_structure", data)
    points = [Space(space).sample(np.random.default_rng(number)) for number in range(BUDGET)]
    pairs = ((Candidate(n, point), float(losses[row_of(dict(point.changes)), 0])) for n, point in enumerate(points))
    searcher.tell([CandidateResult(candidate, -loss) for candidate, loss in pairs])
    began = time.process_time()
    searcher.ask(range(BUDGET, BUDGET + 3))
    return (time.process_time() - began) / 3


def b_scores(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the area under the performance profile up to 4 times the best, of the searchers without priors.

    Source: AlgoPerf, docs/DOCUMENTATION.md (B score, r_max = 4); a workload is a table, its time the evaluations.
    """
    best = {table: min(row[table] for row in rows) for table in TITLES}
    return {
        row["searcher"]: statistics.mean(max(0.0, (4 - row[table] / best[table]) / 3) for table in TITLES)
        for row in rows
    }


def headline_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the figures by which the searchers are judged."""
    means = {row["searcher"]: row["mean"] for row in rows}
    plain = [row for row in rows if not row["searcher"].endswith("prior")]
    scores = b_scores(plain)
    peer = min((name for name in PEERS if name in means), key=means.__getitem__)
    gp = next(row for row in rows if row["searcher"] == "gp")
    return {
        **{f"evaluations_{table}": gp[table] for table in (*TITLES, "macro") if table in gp},
        "evaluations_mean": means["gp"],
        "evaluations_with_prior": means["gp with prior"],
        "evaluations_with_wrong_prior": means["gp with wrong prior"],
        "gp_over_best_peer": means[peer] / means["gp"],
        "nars_over_best_peer": means[peer] / means["nars"],
        "b_score_gp": scores["gp"],
        "b_score_nars": scores["nars"],
        "b_score_best_peer": scores[peer],
    }


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, help="seeds of each searcher [default: 20; 4 with --quick]")
    parser.add_argument("--only", nargs="+", choices=SEARCHES, help="searchers to measure; without a headline")
    parser.add_argument("--tables", nargs="+", choices=[*TITLES, "macro"], help="by default all; without a headline")
    options = parse(parser)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_data(options.data)
    seeds = range(options.seeds or (4 if options.quick else 20))
    tables = [table for table in tables_in(options.data) if table.title in (options.tables or (*TITLES, "macro"))]
    rows = []
    with_others = any(table.name in TARGETS for table in tables)  # which a prior is made of
    for name in options.only or [each for each in SEARCHES if with_others or not each.endswith("prior")]:
        rows.append(measure(name, tables, seeds))
        print(rows[-1], flush=True)
    headline = (
        {}
        if options.only or options.tables
        else {**headline_of(rows), "seconds_per_ask": seconds_of_a_late_ask(options.data)}
    )
    finish("searchers", rows, headline, options)


if __name__ == "__main__":
    main()
