"""Priors: results of earlier searches over some of the same paths."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raytrain.errors import RecipeError
from raytrain.recipe import read_toml
from search.chooser import fitting
from search.journal.rows import read_decisions
from search.rng import keyed_generator
from search.searcher import Candidate, CandidateResult
from search.space import Space

PRIOR_FIELD = "search.prior"
PATH_PROBES = 32


def read_priors(folders: Sequence[Path], space: Space) -> list[list[CandidateResult]]:
    """Return the results of each earlier search as configurations of this space.

    A configuration keeps the values whose path the space has and whose value it allows; the rest is drawn.

    Raises:
        RecipeError: a folder is not that of a search, or its results share no path with the space.
    """
    for number in range(PATH_PROBES):
        space.sample(keyed_generator(0, "probe", number))
    return [_read_prior(folder, space) for folder in folders]


def _read_prior(folder: Path, space: Space) -> list[CandidateResult]:
    if not (folder / "lineage.jsonl").is_file():
        raise RecipeError(f"{PRIOR_FIELD}: {folder} is not the folder of a search (no lineage.jsonl)")
    results = _scores(folder)
    paths = {path for values, _ in results for path in values}
    if not paths & space.domains.keys():
        raise RecipeError(
            f"{PRIOR_FIELD}: {folder} shares no path with the space; it has "
            f"{', '.join(sorted(paths)) or 'no results'}, and the space has {', '.join(sorted(space.domains))}"
        )
    sign = -1 if read_toml(str(folder), [])[0]["search"]["mode"] == "min" else 1
    found = []
    for number, (values, score) in enumerate(results):
        configuration = space.run(fitting(values, keyed_generator(0, "prior", number)))
        found.append(CandidateResult(Candidate(number, configuration), sign * score))
    return found


def _scores(folder: Path) -> list[tuple[dict[str, Any], float]]:
    """Return the decisions and the last score of each trial; those of a trial stand in the row that began it."""
    values: dict[int, dict[str, Any]] = {}
    scores: dict[int, float] = {}
    for row in read_decisions(folder):
        member = row["member"]
        if "new" in row:
            values[member] = row.get("genome", row["new"])
        if "score" in row and "ended" in row:
            scores[member] = row["score"]
    return [(values[member], score) for member, score in scores.items()]
