"""How well predictors rank configurations that they have not seen, on the HPOLib tables.

Each predictor is fitted on n random configurations by one stored run of each (the seed's remainder by 4), and its rank
correlation is taken over 4,000 others with the mean of their other three runs. The architecture encoder of NARS is
trained with and without pre-training on the same schedule. The headline has the smallest gain of pre-training over the
tables, and the lower end of its 95 % interval.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architecture_encoder import EncoderPredictor
from bench import finish, parse, parser_of
from hpolib import INPUTS, check_data, losses_of, row_of, space

from raytrain.registry import resolve
from search.chooser import Configuration
from search.predictor.predictor import Predictor, rank_correlation
from search.space import Space
from search.surrogate.encoding import FloatArray
from search.surrogate.targets import standardised
from search.tables import PREDICTORS

SIZES = (20, 50, 100, 200)
UNSEEN = 4000
ARCHITECTURE = ("activation_fn_1", "activation_fn_2", "n_units_1", "n_units_2")
PRETRAINED, PLAIN = "encoder, pre-trained", "encoder"
NAMES = (*PREDICTORS, PLAIN, PRETRAINED)
DRAWN_ARCHITECTURES = 2000


def statistics_of(table: str, architectures: Sequence[Configuration]) -> FloatArray:
    """Return log parameters and log units of networks with two hidden layers, shape (n, 2)."""
    inputs, rows = INPUTS[table], []
    for each in architectures:
        first, second = each.changes["n_units_1"], each.changes["n_units_2"]
        parameters = inputs * first + first * second + 2 * second + first + 1
        rows.append([math.log(parameters), math.log(first + second)])
    return np.array(rows)


def predictor_of(name: str, table: str, seed: int) -> Predictor | EncoderPredictor:
    """Return a predictor that is not fitted."""
    if name in PREDICTORS:
        found: Predictor = resolve(PREDICTORS, name, "predictor")()
        return found
    rng = np.random.default_rng([seed, 2])
    count = DRAWN_ARCHITECTURES if name == PRETRAINED else 0
    architectures = [Space(space).sample(rng) for _ in range(count)]
    return EncoderPredictor(architectures, lambda some: statistics_of(table, some), ARCHITECTURE)


def correlations(table: str, data: Path, seed: int) -> dict[tuple[str, int], float]:
    """Return the rank correlation of each predictor at each size."""
    losses, column = losses_of(table, data), seed % 4
    rng = np.random.default_rng([seed, 1])
    points = [Space(space).sample(rng) for _ in range(UNSEEN + max(SIZES))]
    rows = [row_of(dict(point.changes)) for point in points]
    seen, unseen = points[: max(SIZES)], points[max(SIZES) :]
    measured = losses[rows[: max(SIZES)], column]
    truth = np.delete(losses[rows[max(SIZES) :]], column, axis=1).mean(axis=1)
    found = {}
    for size in SIZES:
        for name in NAMES:
            predictor = predictor_of(name, table, seed)
            predictor.fit(seen[:size], standardised(measured[:size]), np.random.default_rng([seed, size]))
            found[name, size] = rank_correlation(predictor.predict(unseen)[0], truth)
    return found


def headline_of(found: dict[str, list[dict[tuple[str, int], float]]]) -> dict[str, Any]:
    """Return the gain of pre-training on the table where it is least, and the best predictor of each size."""
    headline: dict[str, Any] = {}
    for size in SIZES:
        gains = {}
        for table, each in found.items():
            pairs = [one[PRETRAINED, size] - one[PLAIN, size] for one in each]
            half = 1.96 * statistics.stdev(pairs) / math.sqrt(len(pairs))
            gains[table] = (statistics.mean(pairs) - half, statistics.mean(pairs))
        low, mean = min(gains.values())
        headline |= {f"pretrained_minus_plain_{size}": mean, f"pretrained_minus_plain_{size}_low": low}
        means = {name: statistics.mean(one[name, size] for each in found.values() for one in each) for name in NAMES}
        headline[f"best_at_{size}"] = max(means, key=means.__getitem__)
    return headline


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, help="seeds of each table [default: 8; 2 with --quick]")
    options = parse(parser)
    check_data(options.data)
    torch.set_num_threads(1)
    seeds = range(options.seeds or (2 if options.quick else 8))
    found: dict[str, list[dict[tuple[str, int], float]]] = {}
    rows = []
    for table in INPUTS:
        found[table] = [correlations(table, options.data, seed) for seed in seeds]
        for name in NAMES:
            means = {f"n={size}": statistics.mean(one[name, size] for one in found[table]) for size in SIZES}
            rows.append({"table": table.partition("_")[0], "predictor": name, **means})
            print(rows[-1], flush=True)
    finish("predictor", rows, headline_of(found), options)


if __name__ == "__main__":
    main()
