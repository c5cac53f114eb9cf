"""Earlier searches as priors: what is read of them, what they are worth, and what a wrong one costs."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytrain.errors import RecipeError
from search.chooser import Chooser
from search.journal.journal import Journal
from search.prior import read_priors
from search.scheduling.driver import SegmentEnd, drive
from search.scheduling.scheduler import Problem
from search.scheduling.segments import Objective
from search.searcher import Candidate, CandidateResult
from search.searchers.gp import GaussianProcessSearcher
from search.space import Space, make_space
from search.sweep.options import PriorOptions, SweepOptions
from search.sweep.searches import gp, random

Results = list[CandidateResult]


def program(choose: Chooser) -> dict[str, Any]:
    widths = [choose.ordered(f"width{layer}", [8, 16, 32, 64]) for layer in range(choose.int("layers", 1, 3))]
    return {
        "task.widths": widths,
        "task.norm": choose.one_of("norm", ["none", "batch", "layer"]),
        "optimizer.lr": choose.float("lr", 1e-4, 1e-1, log=True),
        "dropout": choose.float("dropout", 0, 1),
        "batch": choose.ordered("batch", [8, 16, 32, 64]),
    }


SPACE = Space(program)


def loss_of(changes: Any) -> float:
    """Least, 0.01, for two layers of 64, layer norm, a rate of 0.003, no dropout and batches of 16."""
    rate = (np.log10(changes["optimizer.lr"]) + 2.5) ** 2
    shape = abs(sum(changes["task.widths"]) - 128) / 64 + abs(len(changes["task.widths"]) - 2)
    rest = changes["dropout"] + abs(np.log2(changes["batch"]) - 4) / 2 + (changes["task.norm"] != "layer")
    return float(0.01 + rate + shape + rest)


def drawn(count: int, seed: int, loss: Callable[[Any], float] = loss_of) -> Results:
    points = [SPACE.sample(np.random.default_rng([seed, number])) for number in range(count)]
    return [CandidateResult(Candidate(number, each), -loss(each.changes)) for number, each in enumerate(points)]


def evaluations(priors: Sequence[Results], seed: int) -> int:
    searcher = GaussianProcessSearcher(SPACE, seed, priors)
    for number in range(60):
        [candidate] = searcher.ask([number])
        loss = loss_of(candidate.configuration.changes)
        if loss <= 0.8:
            return number + 1
        searcher.tell([CandidateResult(candidate, -loss)])
    return 61


@cache
def evaluations_without(seed: int) -> int:
    return evaluations([], seed)


def test_a_prior_of_a_similar_search_saves_evaluations() -> None:
    def similar(changes: Any) -> float:
        return 3 * loss_of(changes) + abs(np.log10(changes["optimizer.lr"]) + 2)

    with_prior = [evaluations([drawn(50, seed, similar)], seed) for seed in range(2)]
    assert sum(with_prior) <= 0.6 * sum(evaluations_without(seed) for seed in range(2))


def test_shuffled_results_change_nothing() -> None:
    results = drawn(150, 0)
    fitness = np.random.default_rng(1).permutation([result.fitness for result in results])
    shuffled = [CandidateResult(each.candidate, float(new)) for each, new in zip(results, fitness, strict=True)]
    with_prior, without = (GaussianProcessSearcher(SPACE, 0, priors) for priors in ([shuffled], []))
    for number in range(8):
        [one], [other] = with_prior.ask([number]), without.ask([number])
        assert one == other
        for searcher in (with_prior, without):
            searcher.tell([CandidateResult(one, -loss_of(one.configuration.changes))])


def test_a_prior_of_the_opposite_costs_at_most_ten_evaluations() -> None:
    """What own results disagree with loses its say."""
    for seed in range(2):
        opposite = drawn(50, seed, lambda changes: 8 - loss_of(changes))
        assert evaluations([opposite], seed) <= evaluations_without(seed) + 10


def test_a_search_with_a_prior_goes_on_with_the_same_proposals() -> None:
    priors = [drawn(30, 0), drawn(30, 1)]
    whole, cut = (GaussianProcessSearcher(SPACE, 3, priors) for _ in range(2))
    for searcher in (whole, cut):
        for number in range(6):
            [candidate] = searcher.ask([number])
            searcher.tell([CandidateResult(candidate, -loss_of(candidate.configuration.changes))])
    again = GaussianProcessSearcher(SPACE, 3, priors)
    again.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert whole.ask([6, 7]) == again.ask([6, 7])


def searched(folder: Path, program: Any) -> None:
    """Leave the folder of a search of 12 trials."""
    folder.mkdir()
    options = SweepOptions(name="random", space={}, trials=12)
    journal = Journal(folder, random(Problem(Space(program), Objective("loss", "lower"), steps=1), options))
    journal.open()
    drive(journal, journal.store, lambda work, _: SegmentEnd(b"", 1, {"loss": loss_of(work.changes)}))
    (folder / "recipe.toml").write_text('kind = "search"\n[search]\nmode = "min"\n')


def test_results_are_read_from_the_folder_of_a_search(tmp_path: Path) -> None:
    """The decisions of a function too, whose paths are not the fields; what does not fit any more is drawn."""
    searched(tmp_path / "a", program)
    [results] = read_priors([tmp_path / "a"], Space(program))
    assert len(results) == 12
    for result in results:
        assert result.fitness == -loss_of(result.candidate.configuration.changes)

    def smaller(choose: Chooser) -> dict[str, Any]:
        return {"lr": choose.float("lr", 1e-4, 1e-1, log=True), "norm": choose.one_of("norm", ["layer", "group"])}

    [fewer] = read_priors([tmp_path / "a"], Space(smaller))
    assert [each.candidate.configuration.changes["lr"] for each in fewer] == [
        each.candidate.configuration.changes["optimizer.lr"] for each in results
    ]
    assert {each.candidate.configuration.changes["norm"] for each in fewer} == {"layer", "group"}
    options = PriorOptions(name="gp", space={}, prior=(str(tmp_path / "a"),))
    [work] = gp(Problem(Space(program), Objective("loss", "lower"), steps=1), options).ask(1)
    assert loss_of(work.changes) < np.median([-result.fitness for result in results])


def test_priors_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        read_priors([tmp_path], SPACE)
    assert str(error.value) == f"search.prior: {tmp_path} is not the folder of a search (no lineage.jsonl)"
    searched(tmp_path / "a", program)
    other = make_space({"depth": {"type": "int", "low": 1, "high": 2}, "heads": {"type": "int", "low": 1, "high": 2}})
    with pytest.raises(RecipeError) as error:
        read_priors([tmp_path / "a"], other)
    assert str(error.value) == (
        f"search.prior: {tmp_path / 'a'} shares no path with the space; it has batch, dropout, layers, lr, norm, "
        "width0, width1, width2, and the space has depth, heads"
    )
