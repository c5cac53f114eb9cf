"""Panels of what a predictor makes of the trials of a sweep: which hyperparameters matter, and how well it predicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raytrain.json_files import is_number
from raytrain.registry import resolve
from raytrain.run.report.panel import Panel
from search.chooser import Configuration, Decision, Genome
from search.domains import Choice, Domain, Float
from search.predictor.predictor import Predictor, rank_correlation
from search.report.values import WIDE, in_words
from search.rng import keyed_generator
from search.scheduling.segments import Objective
from search.surrogate.encoding import FloatArray
from search.surrogate.targets import TargetScale
from search.tables import PREDICTORS

DEFAULT_PREDICTOR = "gp"
LEAST_TRIALS = 10
"""Trials below which no predictor is fitted."""
LARGEST_SCORE = 1e100
"""Numbers from which squares overflow; infinite ones and NaN are beyond it."""
MODELLED = 150
"""Trials that one is fitted on at most, spread over the search."""
VARIANCE_DRAWS = 400
"""Draws that the variance of all predictions is taken over."""
BACKGROUND = 40
"""Draws that a mean over all other hyperparameters is taken over."""
IMPORTANCE_LEVELS = 6
"""Values of a number."""
SHOWN_IMPORTANCES = 10
"""Hyperparameters that are shown, the most important ones."""
GROUPS = 5
"""Parts of the trials that are left out in turn, for the error of an importance."""

Values = Mapping[str, Any]
"""Path -> value of the decisions of a trial."""


@dataclass(frozen=True, slots=True)
class Observed:
    """Trials as what a predictor is fitted on; the domains are those of the values that were seen.

    Attributes:
        domains: path -> domain, of the decisions that differ.
        configurations: of the n trials.
        targets: shape (n,), their standardised losses.
        losses: shape (n,), as they were measured.
    """

    domains: Mapping[str, Domain]
    configurations: Sequence[Configuration]
    targets: FloatArray
    losses: FloatArray

    @classmethod
    def of(cls, trials: Sequence[tuple[Values, float]]) -> "Observed":
        """Return some of the trials, each with its finite loss."""
        some = [trials[place] for place in np.unique(np.linspace(0, len(trials) - 1, MODELLED).astype(int))]
        paths = dict.fromkeys(path for values, _ in some for path in values)
        found = {path: _domain([values[path] for values, _ in some if path in values]) for path in paths}
        domains = {path: domain for path, domain in found.items() if domain}
        losses = np.array([loss for _, loss in some])
        configurations = [_seen(domains, values) for values, _ in some]
        return cls(domains, configurations, TargetScale.of(losses).targets(losses), losses)

    def fitted(self, name: str, kept: Sequence[int] | None = None) -> Predictor:
        """Return a predictor that is fitted on the trials, or on some of them."""
        places = range(len(self.targets)) if kept is None else kept
        predictor: Predictor = resolve(PREDICTORS, name, "search.predictor")()
        some = [self.configurations[place] for place in places]
        predictor.fit(some, self.targets[list(places)], keyed_generator(0, "report"))
        return predictor


def model_panels(objective: Objective, trials: Sequence[tuple[Values, float]], predictor: str) -> list[Panel]:
    """Return the importance of each hyperparameter, and for a search that predicts, predicted against true scores.

    Args:
        objective: what is improved.
        trials: decisions and score of each trial that was trained to the end.
        predictor: that the search used; "": none.
    """
    sign = -objective.fitness(1.0)
    finite = [(values, sign * score) for values, score in trials if abs(score) < LARGEST_SCORE]
    if len(finite) < LEAST_TRIALS:
        return []
    observed = Observed.of(finite)
    if not observed.domains or not observed.targets.any():
        return []
    name = predictor if predictor in PREDICTORS else DEFAULT_PREDICTOR
    left_out = observed.fitted(name).leave_one_out()
    panels = [_importance(observed, name, rank_correlation(left_out, observed.targets))]
    return [*panels, _predictions(objective, observed, name, left_out)] if predictor else panels


def importances(observed: Observed, fitted: Predictor, rng: np.random.Generator) -> FloatArray:
    """Return the share of the variance of what a predictor predicts that each decision has by itself, shape (d,).

    V_i = Var over x_i of the mean of f over all other decisions; the share is V_i / Var f. Values are uniform between
    those that were seen; which decisions are active is drawn from the trials.

    Source: Hutter et al. 2014, An Efficient Approach for Assessing Hyperparameter Importance (functional ANOVA).
    """
    shapes = [
        observed.configurations[place] for place in rng.integers(len(observed.configurations), size=VARIANCE_DRAWS)
    ]
    draws = [{each.path: _drawn(each, rng) for each in shape.genome.decisions} for shape in shapes]
    predicted, _ = fitted.predict([_configuration(draw) for draw in draws])
    shares = []
    for path, domain in observed.domains.items():
        active = [draw for draw in draws[:BACKGROUND] if path in draw]
        levels = [Decision(path, domain, value) for value in _levels(domain)]
        changed = [_configuration({**draw, path: level}) for level in levels for draw in active]
        means = fitted.predict(changed)[0].reshape(len(levels), -1).mean(axis=1) if active else np.zeros(1)
        shares.append(float(means.var()) * len(active) / BACKGROUND)
    return np.array(shares) / (float(predicted.var()) or 1.0)


def _importance(observed: Observed, name: str, correlation: float) -> Panel:
    """Return the importances with their jackknife errors, the groups of trials left out in turn."""
    count, parts = len(observed.targets), []
    for left_out in (None, *range(GROUPS)):
        kept = [place for place in range(count) if left_out is None or place % GROUPS != left_out]
        parts.append(importances(observed, observed.fitted(name, kept), keyed_generator(0, "importance")))
    shares, each = parts[0], np.array(parts[1:])
    errors = np.sqrt((GROUPS - 1) * ((each - each.mean(axis=0)) ** 2).mean(axis=0))
    order = np.argsort(shares)[-SHOWN_IMPORTANCES:]
    names, values, spread = [list(observed.domains)[place] for place in order], shares[order], errors[order]
    error = {"array": spread.tolist(), "arrayminus": np.minimum(spread, values).tolist(), "color": "c7", "thickness": 1}
    bars = {"type": "bar", "orientation": "h", "name": "share", "marker": {"color": "c0"}, "error_x": error}
    layout = {"xaxis": {"title": {"text": "share of the variance"}}, "yaxis": {"ticksuffix": " "}}
    note = (
        f"Functional ANOVA of the predictor {name}, whose leave-one-out predictions of {count} trials have a rank "
        f"correlation of {correlation:.2f} with the scores; where that is low, the bars say little. What is missing to "
        f"1 is interactions. Errors: jackknife over {GROUPS} groups of trials."
    )
    return Panel("Importance", [{**bars, "x": values.tolist(), "y": names}], layout, note=note)


def _predictions(objective: Objective, observed: Observed, name: str, left_out: FloatArray) -> Panel:
    """Return leave-one-out predictions against measured scores."""
    scale, sign = TargetScale.of(observed.losses), -objective.fitness(1.0)
    true = sign * scale.losses(observed.targets)
    predicted = sign * scale.losses(np.minimum(left_out, observed.targets.max()))
    ends = [float(min(true.min(), predicted.min())), float(max(true.max(), predicted.max()))]
    points = {"type": "scatter", "mode": "markers", "name": "trials", "x": true.tolist(), "y": predicted.tolist()}
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": "equal",
        "x": ends,
        "y": ends,
        "line": {"color": "c7", "dash": "dot"},
    }
    wide = "log" if scale.logarithmic and ends[0] > 0 and ends[1] / ends[0] >= WIDE else "linear"
    layout = {
        "xaxis": {"title": {"text": f"measured {objective.metric}"}, "type": wide},
        "yaxis": {"title": {"text": f"predicted {objective.metric}"}, "type": wide},
    }
    note = (
        f"What the predictor {name} says of each trial from all the others; rank correlation "
        f"{rank_correlation(left_out, observed.targets):.2f}. The worst trials count as equally bad."
    )
    return Panel("Predicted against true", [points, line], layout, note=note)


def _domain(values: Sequence[Any]) -> Domain | None:
    """Return the domain of values that were seen; None if they are all equal."""
    if all(is_number(value) and abs(value) < LARGEST_SCORE for value in values):
        low, high = min(values), max(values)
        logarithmic = low > 0 and high / low >= WIDE
        return Float(low=low, high=high, scale="log" if logarithmic else "linear") if low < high else None
    words = tuple(dict.fromkeys(map(in_words, values)))
    return Choice(values=words) if len(words) > 1 else None


def _seen(domains: Mapping[str, Domain], values: Values) -> Configuration:
    """Return a trial as a configuration; decisions that never differ are left out."""
    decisions = {}
    for path, domain in domains.items():
        if path in values:
            value = values[path] if isinstance(domain, Float) else in_words(values[path])
            decisions[path] = Decision(path, domain, value)
    return _configuration(decisions)


def _configuration(decisions: Mapping[str, Decision]) -> Configuration:
    return Configuration(Genome(tuple(decisions.values())), {})


def _drawn(decision: Decision, rng: np.random.Generator) -> Decision:
    """Return a decision with a value that is drawn from its domain."""
    return Decision(decision.path, decision.domain, decision.domain.sample(rng))


def _levels(domain: Domain) -> list[Any]:
    """Return all listed values, or numbers in the middle of equal parts of the scale."""
    if domain.is_listed:
        return list(domain.extremes())
    return [domain.at((level + 0.5) / IMPORTANCE_LEVELS) for level in range(IMPORTANCE_LEVELS)]
