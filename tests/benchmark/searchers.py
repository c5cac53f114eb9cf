"""How many evaluations each searcher takes on the HPOLib tables: a joint search of architecture and training recipe.

A search chooses by one stored training run of each configuration (the seed's remainder by 4), and is judged by the mean
of the other three. Its figure is the number of evaluations until the chosen configuration is as good as the median of
random search after 500 evaluations; the headline is the geometric mean over the four tables of the median over seeds.
Peers are Optuna's samplers, as their users call them.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from bench import finish, parse, parser_of
from hpolib import DIMENSIONS, UNORDERED, check_data, losses_of, row_of, space

from raytrain.registry import resolve
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
BUDGET = 200
PRIOR_RESULTS = 400
OURS = ("gp", "nars", "tpe", "evolution", "mcts", "sobol", "random")

Ask = Callable[[int], tuple[int, Callable[[float], None]]]
"""Number -> (row of the table, what to call with its loss)."""


def ours(name: str, seed: int) -> Ask:
    """Return one of our searchers."""
    return asking(resolve(SEARCHERS, name, "searcher")(Space(space), seed))


def asking(searcher: Searcher) -> Ask:
    """Return how to ask a searcher of ours."""

    def ask(number: int) -> tuple[int, Callable[[float], None]]:
        [candidate] = searcher.ask([number])
        return row_of(dict(candidate.configuration.changes)), lambda loss: searcher.tell(
            [CandidateResult(candidate, -loss)]
        )

    return ask


@dataclass(frozen=True)
class Search:
    """One search of a table."""

    table: str
    data: Path
    seed: int


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


def optunas(sampler: optuna.samplers.BaseSampler) -> Ask:
    """Return a sampler of Optuna's."""
    study = optuna.create_study(sampler=sampler)

    def ask(_: int) -> tuple[int, Callable[[float], None]]:
        trial = study.ask()
        changes = {}
        for name, values in DIMENSIONS.items():
            if name in UNORDERED:
                changes[name] = trial.suggest_categorical(name, values)
            else:
                changes[name] = values[trial.suggest_int(name, 0, len(values) - 1)]
        return row_of(changes), lambda loss: study.tell(trial, float(np.log(loss)))

    return ask


def with_prior(search: Search, *, wrong: bool = False) -> Ask:
    """Return our Gaussian process with the other tables as priors."""
    priors = earlier(search.table, search.data, search.seed, wrong=wrong)
    return asking(GaussianProcessSearcher(Space(space), search.seed, priors))


SEARCHES: dict[str, Callable[[Search], Ask]] = {
    **{name: lambda search, name=name: ours(name, search.seed) for name in OURS},
    "gp with prior": with_prior,
    "gp with wrong prior": partial(with_prior, wrong=True),
    "Optuna TPE": lambda search: optunas(optuna.samplers.TPESampler(seed=search.seed, multivariate=True, group=True)),
    "Optuna GP": lambda search: optunas(optuna.samplers.GPSampler(seed=search.seed)),
}


def evaluations(ask: Ask, losses: np.ndarray[Any, Any], target: float, seed: int) -> tuple[int, float]:
    """Return the evaluations to the target, BUDGET + 1 if it was missed, and the seconds of an ask and a tell."""
    column = seed % 4
    others = [place for place in range(4) if place != column]
    best, chosen, began = np.inf, 0, time.process_time()
    for number in range(BUDGET):
        row, tell = ask(number)
        loss = float(losses[row, column])
        tell(loss)
        if loss < best:
            best, chosen = loss, row
        if losses[chosen, others].mean() <= target:
            return number + 1, (time.process_time() - began) / (number + 1)
    return BUDGET + 1, (time.process_time() - began) / BUDGET


def measure(name: str, data: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Return a row of the table."""
    medians, seconds = {}, []
    for table, target in TARGETS.items():
        losses = losses_of(table, data)
        counts = [evaluations(SEARCHES[name](Search(table, data, seed)), losses, target, seed) for seed in seeds]
        medians[table.partition("_")[0]] = statistics.median(count for count, _ in counts)
        seconds += [each for _, each in counts]
    mean = statistics.geometric_mean(medians.values())
    return {"searcher": name, **medians, "mean": round(mean, 1), "seconds": statistics.mean(seconds)}


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
    tables = [table.partition("_")[0] for table in TARGETS]
    best = {table: min(row[table] for row in rows) for table in tables}
    return {
        row["searcher"]: statistics.mean(max(0.0, (4 - row[table] / best[table]) / 3) for table in tables)
        for row in rows
    }


def headline_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the figures by which the searchers are judged."""
    means = {row["searcher"]: row["mean"] for row in rows}
    plain = [row for row in rows if not row["searcher"].endswith("prior")]
    scores = b_scores(plain)
    peer = min((name for name in means if name.startswith("Optuna")), key=means.__getitem__)
    gp = next(row for row in rows if row["searcher"] == "gp")
    return {
        **{f"evaluations_{table}": gp[table] for table in ("slice", "protein", "naval", "parkinsons")},
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
    options = parse(parser)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_data(options.data)
    seeds = range(options.seeds or (4 if options.quick else 20))
    rows = []
    for name in options.only or SEARCHES:
        rows.append(measure(name, options.data, seeds))
        print(rows[-1], flush=True)
    headline = {} if options.only else {**headline_of(rows), "seconds_per_ask": seconds_of_a_late_ask(options.data)}
    finish("searchers", rows, headline, options)


if __name__ == "__main__":
    main()
