"""Panels of a search's report page: the population, best so far, schedules, the winner's ancestry, sweeps, failures."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from raytrain.json_files import is_number
from raytrain.recipe import read_toml
from raytrain.run.directory import RunDirectory
from raytrain.run.report.panel import Panel, line_chart, table
from search.forecasts import forecast_summary, forecasts
from search.journal.ancestry import ancestors
from search.journal.rows import DecisionRow, ReportRow, read_decisions, read_reports
from search.report.best import Scored, best_panels
from search.report.front import front_panels
from search.report.model import model_panels
from search.report.parallel import parallel_coordinates
from search.report.values import listed, wide_axis
from search.scheduling.segments import Objective
from search.standings import Standing, Standings, standings_of

MANY = 12
"""Members beyond which a chart has no legend."""
FEW = 5
"""Trials below which nothing is said about correlations."""

LineageRows = Sequence[Mapping[str, Any]]
"""Decisions, each of which continues the segment of the one before."""
Trials = Sequence[tuple[Mapping[str, Any], float]]
"""Hyperparameters of a trial -> its last score."""


def search_panels(run: RunDirectory) -> list[Panel]:
    """Return what a search has recorded so far, as panels."""
    objectives, decisions, reports = _objectives(run), read_decisions(run.path), read_reports(run.metrics)
    objective, section = objectives[0], _section(run)
    began = [report for report in reports if _began(decisions, report)]
    scored = _scored(objective, began)
    winner, standings = _winner(objective, decisions, scored), standings_of(objective, decisions, began)
    population = section.get("name") == "pbt" or "population" in section
    unit = "member" if population else "trial"
    charts = [
        _scores(objective, decisions, scored, unit),
        *best_panels(objective, decisions, scored, section),
        *front_panels(objectives, standings, unit),
        *(_schedules(decisions, scored, winner) if population else _sweep(objective, section, decisions, scored)),
        _ancestry(objective, winner, scored, unit),
        (_members if population else _trial_table)(standings, going_on=not run.result.is_file()),
        _failures(decisions, unit),
    ]
    return [panel for panel in charts if panel is not None]


def _objectives(run: RunDirectory) -> list[Objective]:
    """Return what the search improves, which its recipe says once it has begun, and its other objectives."""
    known = _section(run)
    others = known.get("objectives")
    modes = {str(known.get("metric", "")): known.get("mode"), **(others if isinstance(others, Mapping) else {})}
    return [Objective(metric, "higher" if mode == "max" else "lower") for metric, mode in modes.items()]


def _section(run: RunDirectory) -> Mapping[str, Any]:
    section: Any = read_toml(str(run.recipe), [])[0].get("search")
    return section if isinstance(section, Mapping) else {}


def _scored(objective: Objective, reports: Iterable[ReportRow]) -> list[tuple[ReportRow, float]]:
    """Return the reports that have a score, each with it."""
    scores = ((report, report["valid"].get(objective.metric)) for report in reports)
    return [(report, score) for report, score in scores if score is not None]


def _winner(objective: Objective, decisions: Sequence[DecisionRow], scored: Scored) -> LineageRows:
    """Return the decisions that led to the best score so far, the oldest first."""
    known = [(objective.fitness(score), -report["row"]) for report, score in scored]
    return ancestors(decisions, -max(known)[1]) if known else []


def _began(decisions: Sequence[DecisionRow], report: ReportRow) -> bool:
    """Return whether the segment that a report ends is in the lineage."""
    return 0 <= report["row"] < len(decisions) and "new" in decisions[report["row"]]


def _scores(objective: Objective, decisions: Sequence[DecisionRow], scored: Scored, unit: str) -> Panel | None:
    """Return the scores of all members or trials over their steps, and who copied whom."""
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for report, score in scored:
        steps, scores = lines.setdefault(f"{unit} {report['member']}", ([], []))
        steps.append(report["step"])
        scores.append(score)
    copies = [
        row for row in decisions if {"score", "parent_score", "step"} <= row.keys() and row["action"] == "exploit"
    ]
    note = "A dotted line joins a member to its donor." if copies else ""
    panel = line_chart("Scores", lines, x="step", y=objective.metric, note=note)
    if panel is None:
        return None
    edge = {"type": "scatter", "mode": "lines", "name": "copied", "line": {"dash": "dot", "width": 1, "color": "c7"}}
    xs = [x for row in copies for x in (row["step"], row["step"], None)]
    ys = [y for row in copies for y in (row["score"], row["parent_score"], None)]
    layout = {**panel.layout, "showlegend": len(lines) <= MANY}
    return replace(panel, traces=[*panel.traces, {**edge, "x": xs, "y": ys}] if copies else panel.traces, layout=layout)


def _schedules(decisions: Sequence[DecisionRow], scored: Scored, winner: LineageRows) -> list[Panel | None]:
    """Return a chart for each number of a population: its values over the steps, those of the winner on top."""
    ends = {report["row"]: report["step"] for report, _ in scored}
    won = {row["row"] for row in winner}
    stretches = [(row, ends[row["row"]]) for row in decisions if "new" in row and row["row"] in ends]
    return [_schedule(name, stretches, won) for name in _numbers(decisions)]


def _schedule(name: str, stretches: Sequence[tuple[DecisionRow, int]], won: Collection[int]) -> Panel | None:
    known = [(row, end) for row, end in stretches if is_number(row["new"].get(name))]
    if not known:
        return None
    traces = []
    for title, color, wanted in (("others", "c7", False), ("winner", "c1", True)):
        chosen = [(row["step"], end, row["new"][name]) for row, end in known if (row["row"] in won) is wanted]
        xs = [x for first, last, _ in chosen for x in (first, last, None)]
        ys = [y for _, _, value in chosen for y in (value, value, None)]
        line = {"color": color, "width": 3 if wanted else 1}
        traces.append({"type": "scatter", "mode": "lines", "name": title, "x": xs, "y": ys, "line": line})
    axis = wide_axis(name, [row["new"][name] for row, _ in known])
    return Panel(f"Schedule of {name}", traces, {"xaxis": {"title": {"text": "step"}}, "yaxis": axis})


def _numbers(decisions: Iterable[DecisionRow]) -> list[str]:
    """Return the fields with numbers that differ."""
    values: dict[str, set[float]] = {}
    for row in decisions:
        for name, value in row.get("new", {}).items():
            if is_number(value):
                values.setdefault(name, set()).add(value)
    return [name for name, found in values.items() if len(found) > 1]


def _sweep(
    objective: Objective, section: Mapping[str, Any], decisions: Sequence[DecisionRow], scored: Scored
) -> list[Panel | None]:
    """Return what is shown of trials whose hyperparameters stay, unlike those of a population."""
    trials = _trials(decisions, scored)
    return [
        *model_panels(objective, _decided(decisions, scored), _predictor(section, decisions)),
        _forecasts(objective, decisions),
        _correlations(trials),
    ]


def _trials(decisions: Sequence[DecisionRow], scored: Scored) -> list[tuple[Mapping[str, Any], float]]:
    """Return (hyperparameters, last score) of each trial."""
    last = {report["member"]: (decisions[report["row"]]["new"], score) for report, score in scored}
    return list(last.values())


def _decided(decisions: Sequence[DecisionRow], scored: Scored) -> list[tuple[Mapping[str, Any], float]]:
    """Return (decisions, last score) of the trials that were trained as far as any."""
    last = {report["member"]: (decisions[report["row"]], report["step"], score) for report, score in scored}
    whole = max((step for _, step, _ in last.values()), default=0)
    return [(row.get("genome", row["new"]), score) for row, step, score in last.values() if step == whole]


def _predictor(section: Mapping[str, Any], decisions: Sequence[DecisionRow]) -> str:
    """Return the predictor that the search went by at last; "" for one without."""
    used = [row["predictor"] for row in decisions if "predictor" in row]
    by_process = "gp" in (section.get("name"), section.get("searcher"))
    return used[-1] if used else "gp" if by_process else ""


def _correlations(trials: Trials) -> Panel | None:
    """Return how far scores go with each hyperparameter: the rank correlation over all trials."""
    rows: list[tuple[str, float, int]] = []
    for name in trials[0][0] if len(trials) >= FEW else ():
        pairs = [(values[name], score) for values, score in trials if is_number(values.get(name))]
        if len({value for value, _ in pairs}) > 1 and len(pairs) >= FEW:
            rows.append((name, _rank_correlation(*zip(*pairs, strict=True)), len(pairs)))
    rows.sort(key=lambda row: -abs(row[1]))
    note = "Spearman's coefficient of a hyperparameter and the score; near 0: it did not matter, or not on its own."
    return table("Rank correlation with the score", ["hyperparameter", "correlation", "trials"], rows, note=note)


def _rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's coefficient; equal values share the mean of their ranks."""
    ranks = []
    for values in (np.asarray(one, float), np.asarray(other, float)):
        below = (values[:, None] > values[None, :]).sum(1)
        equal = (values[:, None] == values[None, :]).sum(1)
        ranks.append(below + (equal + 1) / 2)
    centred = [rank - rank.mean() for rank in ranks]
    norm = float(np.linalg.norm(centred[0]) * np.linalg.norm(centred[1]))
    return float(centred[0] @ centred[1]) / norm if norm else 0.0


def _ancestry(objective: Objective, winner: LineageRows, scored: Scored, unit: str) -> Panel | None:
    scores = {report["row"]: score for report, score in scored}
    rows = [[row["step"], row["member"], row["action"], scores.get(row["row"]), listed(row["new"])] for row in winner]
    columns = ["from step", unit, "decision", objective.metric, "hyperparameters"]
    return table("The winner's ancestry", columns, rows)


def _members(standings: Standings, *, going_on: bool) -> Panel | None:
    """Return the members of a population; of a search that was interrupted, none is training."""
    rows = [
        [number, each.step, each.score, each.parent, _state(each, going_on=going_on), listed(each.values)]
        for number, each in standings.ranked()
    ]
    columns = ["member", "step", standings.objective.metric, "last donor", "state", "hyperparameters"]
    return table("Members", columns, rows)


def _trial_table(standings: Standings, *, going_on: bool) -> Panel | None:
    """Return the trials of a sweep, drawn as parallel coordinates where there are several."""
    objective, ranked = standings.objective, standings.ranked()
    rows = [
        [number, each.step, each.score, _state(each, going_on=going_on), listed(each.values)] for number, each in ranked
    ]
    panel = table("Trials", ["trial", "step", objective.metric, "state", "hyperparameters"], rows)
    scored = [(each.values, each.score) for _, each in ranked if each.score is not None and math.isfinite(each.score)]
    if panel is None or len(scored) < 2:
        return panel
    values = {name: [known.get(name) for known, _ in scored] for name in scored[0][0]}
    traces, layout = parallel_coordinates(values, objective.metric, [score for _, score in scored], objective.better)
    return replace(panel, traces=traces, layout=layout, comparable=False)


def _state(standing: Standing, *, going_on: bool) -> str:
    return standing.state if going_on or standing.state != "training" else "paused"


def _forecasts(objective: Objective, decisions: Sequence[DecisionRow]) -> Panel | None:
    """Return what was predicted of the end of each trial, and where it ended."""
    found = forecasts(decisions)
    rows = [
        [each.trial, each.step, each.score, each.low, each.high, each.chance, "stopped" if each.stopped else each.end]
        for each in found
    ]
    columns = ["trial", "at step", f"predicted {objective.metric}", "from", "to", "chance to be best", "end"]
    return table("Forecasts", columns, rows, note=f"{forecast_summary(found).capitalize()}.")


def _failures(decisions: Sequence[DecisionRow], unit: str) -> Panel | None:
    rows = [
        [row["member"], row.get("step"), row["action"], row["failure"].get("cause"), row["failure"].get("message")]
        for row in decisions
        if "failure" in row
    ]
    return table("Failures", [unit, "step", "decision", "cause", "message"], rows)
