"""Parallel coordinates: trials as lines across an axis for each hyperparameter and the score."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytrain.json_files import is_number
from search.report.values import in_words, is_wide

BEST_SHARE = 0.2
"""Share of the trials that stand out."""
MAX_LABELS = 12
"""Labels between the ends of an axis; of more, every second one is left out, and so on."""


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: where values lie between 0 and 1, and the labels beside it."""

    title: str
    places: Sequence[float]
    labels: Mapping[str, float]


def parallel_coordinates(
    values: Mapping[str, Sequence[Any]], metric: str, scores: Sequence[float], better: str
) -> tuple[list[Mapping[str, Any]], Mapping[str, Any]]:
    """Return the traces and the layout of a chart, as Plotly takes them.

    Plotly's own `parcoords` asks for WebGL, which browsers on remote machines lack.

    Args:
        values: hyperparameter -> its value in each trial.
        metric: that the scores are of.
        scores: of the trials, finite.
        better: "lower" or "higher".
    """
    axes = [_axis_of(name, each) for name, each in {**values, metric: scores}.items()]
    order = sorted(range(len(scores)), key=lambda place: scores[place] if better == "lower" else -scores[place])
    best = math.ceil(BEST_SHARE * len(order))
    groups = (("others", "c7", 1, order[best:]), ("best fifth", "c1", 2, order[:best]))
    lines = [
        {"type": "scatter", "mode": "lines", "name": name, "line": {"color": color, "width": width},
         **_joined([(range(len(axes)), [axis.places[trial] for axis in axes]) for trial in trials])}
        for name, color, width, trials in groups if trials
    ]  # fmt: skip
    frame = {"type": "scatter", "showlegend": False, "hoverinfo": "skip"}
    uprights = {**frame, "mode": "lines", "line": {"color": "c7", "width": 1}}
    uprights |= _joined([((place, place), (0, 1)) for place in range(len(axes))])
    labels = [(place, height, text) for place, axis in enumerate(axes) for text, height in axis.labels.items()]
    words = {**frame, "mode": "text", "textposition": "middle left", "textfont": {"size": 10}}
    words |= {"x": [x for x, *_ in labels], "y": [y for _, y, _ in labels], "text": [f"{text} " for *_, text in labels]}
    titles = {"tickvals": list(range(len(axes))), "ticktext": [axis.title for axis in axes]}
    layout = {
        "xaxis": {**titles, "range": [-0.5, len(axes) - 0.9], "showgrid": False, "zeroline": False},
        "yaxis": {"visible": False, "range": [-0.05, 1.05]},
    }
    return [uprights, *lines, words], layout


def _joined(lines: Sequence[tuple[Sequence[float], Sequence[float]]]) -> dict[str, list[float | None]]:
    """Return lines as one, with gaps."""
    return {
        "x": [each for xs, _ in lines for each in (*xs, None)],
        "y": [each for _, ys in lines for each in (*ys, None)],
    }


def _axis_of(title: str, values: Sequence[Any]) -> Axis:
    """Return an axis, logarithmic for numbers far apart; what is no number has a place for each value."""
    if all(is_number(value) and math.isfinite(value) for value in values):
        return _number_axis(title, values)
    words = [in_words(value) for value in values]
    places = {word: place for place, word in enumerate(sorted(set(words)))}
    heights = {word: (place + 0.5) / len(places) for word, place in places.items()}
    every = math.ceil(len(places) / MAX_LABELS)
    return Axis(title, [heights[word] for word in words], dict(list(heights.items())[::every]))


def _number_axis(title: str, values: Sequence[float]) -> Axis:
    wide = is_wide(values)
    ticks = _ticks(values) if wide else [min(values), (min(values) + max(values)) / 2, max(values)]
    scaled, marks = ([math.log(each) for each in row] if wide else row for row in (values, ticks))
    low, span = min(scaled), (max(scaled) - min(scaled)) or 1.0
    labels = {in_words(float(tick)): (mark - low) / span for tick, mark in zip(ticks, marks, strict=True)}
    return Axis(title, [(each - low) / span for each in scaled], labels)


def _ticks(values: Sequence[float]) -> list[float]:
    """Return the powers of ten between the ends of a range, and the ends."""
    low, high = min(values), max(values)
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    inside = [10.0**power for power in powers if 1.5 * low < 10.0**power < high / 1.5]
    return [low, *inside[:: math.ceil(len(inside) / MAX_LABELS) or 1], high]
