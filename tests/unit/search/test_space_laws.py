"""Laws of generated search spaces: replay in another process, mutation, crossover, enumeration, what is asked."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.registry import resolve
from search.chooser import Chooser, crossing
from search.searcher import CandidateResult, Searcher
from search.searchers.grid import grid_points
from search.searchers.proposals import key_of
from search.space import Space
from search.space_size import space_size
from search.tables import SEARCHERS

seeds = st.integers(0, 10_000)
KINDS = ("one_of", "ordered", "int", "bool", "float")


def tree_of(rng: random.Random, kinds: tuple[str, ...], depth: int = 2) -> list[Any]:
    """Return one to three decisions: (kind, values or bounds, decisions that are active under its first value)."""
    tree = []
    for _ in range(rng.randint(1, 3)):
        kind, low = rng.choice(kinds), rng.randint(-3, 3)
        values = {"bool": [], "int": [low, low + rng.randint(1, 3)], "float": [low, low + rng.randint(1, 3)]}
        listed = rng.sample(range(10), rng.randint(2, 4))
        inner = tree_of(rng, kinds, depth - 1) if depth and rng.random() < 0.4 else []
        tree.append((kind, values.get(kind, listed), inner))
    return tree


def generated(seed: int, kinds: tuple[str, ...] = KINDS) -> Space:
    tree = tree_of(random.Random(seed), kinds)

    def program(choose: Chooser) -> Mapping[str, Any]:
        changes: dict[str, Any] = {}
        decide(choose, tree, changes, "")
        return changes

    return Space(program)


def decide(choose: Chooser, tree: list[Any], changes: dict[str, Any], prefix: str) -> None:
    for place, (kind, values, inner) in enumerate(tree):
        name = f"d{place}"
        value = getattr(choose, kind)(name, *([values] if kind in ("one_of", "ordered") else values))
        changes[f"{prefix}{name}"] = value
        if not value if kind == "bool" else value <= values[0] + 0.5:
            with choose.under(name):
                decide(choose, inner, changes, f"{prefix}{name}.")


def replays(count: int) -> list[Any]:
    """Return genomes, what they replay to, and what a searcher proposes, of some spaces."""
    found = []
    for seed in range(count):
        space = generated(seed)
        values = json.loads(json.dumps(space.sample(np.random.default_rng(seed)).genome.values()))
        again = space.replay(values)
        asked = resolve(SEARCHERS, "evolution", "searcher")(generated(seed), seed).ask(range(3))
        proposals = [dict(each.configuration.changes) for each in asked]
        found.append([values, dict(again.changes), again.genome.version(), proposals])
    return found


def test_a_genome_replays_in_another_process() -> None:
    """Whose hashes of strings are others."""
    words = f"import json, runpy; print(json.dumps(runpy.run_path({__file__!r})['replays'](8)))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    ended = subprocess.run([sys.executable, "-c", words], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == replays(8)


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_a_mutant_differs_in_a_decision_that_it_takes_and_is_in_the_space(seed: int) -> None:
    """Unless all candidates were asked."""
    space = generated(seed)
    searcher, parents = resolve(SEARCHERS, "evolution", "searcher")(space, seed), {}
    for number in range(12):
        [candidate] = searcher.ask([number])
        child = candidate.configuration
        assert space.replay(child.genome.values()) == child
        if number >= 5 and len({key_of(each) for each in parents.values()} | {key_of(child)}) == number + 1:
            taken = child.genome.values().items()
            assert all(taken ^ each.genome.values().items() for each in parents.values())
        parents[number] = child
        searcher.tell([CandidateResult(candidate, float(number))])


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_a_child_takes_each_decision_from_a_parent_that_has_it(seed: int) -> None:
    space, rng = generated(seed), np.random.default_rng(seed)
    one, other = (space.sample(rng).genome.values() for _ in range(2))
    child = space.run(crossing(one, other, rng)).genome.values()
    for path, value in child.items():
        parents = [each[path] for each in (one, other) if path in each]
        assert value in parents or not parents


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_enumeration_and_count_agree(seed: int) -> None:
    space = generated(seed, ("one_of", "ordered", "int", "bool"))
    size = space_size(space)
    keys = [key_of(point) for point in islice(grid_points(space, 10), 2000)]
    assert len(set(keys)) == len(keys)
    if len(keys) == 2000:
        assert size.count > 1000
        return
    assert (size.count, size.exact) == (len(keys), True)
    drawn = {key_of(space.sample(np.random.default_rng([seed, number]))) for number in range(20)}
    assert drawn <= set(keys)
    assert math.isinf(space_size(generated(seed, ("float",))).count)


@pytest.mark.parametrize("name", [name for name in SEARCHERS if name not in ("tpe", "nars")])
@settings(max_examples=3, deadline=None)
@given(seed=seeds)
def test_no_candidate_is_asked_twice_until_the_space_is_spent(name: str, seed: int) -> None:
    """Of the slow ones, TPE and NARS, one space is asked in `test_searchers`."""
    space = generated(seed, ("one_of", "ordered", "int"))
    size = int(space_size(space).count)
    searcher: Searcher = resolve(SEARCHERS, name, "searcher")(space, seed)
    asked: list[str] = []
    for number in range(min(size, 12)):
        [candidate] = searcher.ask([number])
        asked.append(key_of(candidate.configuration))
        searcher.tell([CandidateResult(candidate, -float(number))])
    assert len(set(asked)) == len(asked)
