"""Search spaces: a table and a function are the same object, and a genome replays."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain.errors import RecipeError
from search.chooser import Chooser, Configuration, crossing, perturbing
from search.domains import Domain
from search.searchers.grid import grid_points
from search.space import Space, make_space
from search.space_size import space_size

TABLE = {
    "optimizer": {
        "name": {"type": "choice", "values": ["sgd", "adamw", "lion"]},
        "lr": {"type": "float", "low": 1e-4, "high": 1.0, "scale": "log"},
        "momentum": {"type": "float", "low": 0.5, "high": 0.99, "when": {"optimizer": {"name": "sgd"}}},
        "nesterov": {"type": "bool", "when": {"optimizer.name": ["sgd", "lion"]}},
    },
    "batch": {"type": "ordered", "values": [16, 32, 64]},
}

seeds = st.integers(0, 2**32)


def nested(choose: Chooser) -> dict[str, Any]:
    widths = []
    for layer in range(choose.int("layers", 1, 3)):
        with choose.under("block", layer):
            widths.append(choose.ordered("width", [8, 16, 32]))
            if choose.bool("norm"):
                choose.float("eps", 1e-6, 1e-3, log=True)
    return {"task.widths": widths, "task.norm": choose.one_of("norm", ["batch", "layer"])}


SPACES = {"table": make_space(TABLE), "function": Space(nested)}


def never(path: str, domain: Domain) -> Any:
    raise AssertionError(path)


@pytest.mark.parametrize("name", SPACES)
@given(seed=seeds)
def test_a_genome_replays(name: str, seed: int) -> None:
    space = SPACES[name]
    sample = space.sample(np.random.default_rng(seed))
    again = space.replay(sample.genome.values())
    assert again == sample
    assert again.genome.version() == sample.genome.version()


@pytest.mark.parametrize("name", SPACES)
@given(first=seeds, second=seeds, seed=seeds)
def test_mutants_and_children_are_in_the_space(name: str, first: int, second: int, seed: int) -> None:
    space, rng = SPACES[name], np.random.default_rng(seed)
    one, other = (space.sample(np.random.default_rng(each)).genome.values() for each in (first, second))
    for policy in (perturbing(one, rng, resample=0.25), crossing(one, other, rng)):
        found = space.run(policy)
        assert all(decision.domain.contains(decision.value) for decision in found.genome.decisions)
        assert space.replay(found.genome.values()) == found
    child = space.run(crossing(one, other, rng)).genome.values()
    assert all(value in (one.get(path, value), other.get(path, value)) for path, value in child.items())


def test_conditions_switch_dimensions_on_and_off() -> None:
    space, rng = make_space(TABLE), np.random.default_rng(0)
    for _ in range(100):
        changes = space.sample(rng).changes
        assert ("optimizer.momentum" in changes) == (changes["optimizer.name"] == "sgd")
        assert ("optimizer.nesterov" in changes) == (changes["optimizer.name"] in ("sgd", "lion"))


def test_quoted_names_are_the_same_as_nested_ones() -> None:
    flat = {"optimizer.lr": TABLE["optimizer"]["lr"], "batch": TABLE["batch"]}
    deep = {"optimizer": {"lr": TABLE["optimizer"]["lr"]}, "batch": TABLE["batch"]}
    samples = [make_space(table).sample(np.random.default_rng(1)) for table in (flat, deep)]
    assert samples[0] == samples[1]


def test_values_are_plain_data_as_they_are_read_back() -> None:
    """Otherwise a tuple would be another value after a restart."""
    space = Space(lambda choose: {"widths": choose.ordered("widths", [(8,), (8, 8), (8, 8, 8)])})
    widths = space.replay({"widths": [8, 8]})
    assert space.sample(np.random.default_rng(0)).changes["widths"] in ([8], [8, 8], [8, 8, 8])
    assert space.run(perturbing(widths.genome.values(), np.random.default_rng(0))).changes["widths"] in ([8], [8, 8, 8])


def test_perturbation_brings_a_value_inside_bounds_that_have_changed() -> None:
    table = {
        "lr": {"type": "float", "low": 0.1, "high": 0.2, "scale": "log"},
        "n": {"type": "int", "low": 3, "high": 5},
        "kind": {"type": "choice", "values": ["a", "b"]},
        "size": {"type": "ordered", "values": [1, 2]},
    }
    old = {"lr": 0.0, "n": 100, "kind": "c", "size": 7}
    for seed in range(20):
        found = make_space(table).run(perturbing(old, np.random.default_rng(seed)))
        assert all(decision.domain.contains(decision.value) for decision in found.genome.decisions)


def test_versions_tell_spaces_apart() -> None:
    def version(**change: Any) -> str:
        table = {"x": {"type": "int", "low": 1, "high": 4, **change}}
        return make_space(table).sample(np.random.default_rng(0)).genome.version()

    assert version() == version()
    assert version() != version(high=5)


def test_a_function_by_name_is_a_space(workplace: Any) -> None:
    (workplace / "mine.py").write_text("def space(choose):\n    return {'batch': choose.int('batch', 1, 4)}\n")
    found = make_space("mine:space").sample(np.random.default_rng(0))
    assert isinstance(found, Configuration)
    assert found.genome.values() == dict(found.changes)


def test_a_function_that_decides_wrongly_is_named_with_the_line_in_its_file(workplace: Any) -> None:
    """Not with the line of the chooser that refuses it."""
    lines = {
        "choose.bool('x'); choose.bool('x')": "x: decided twice; give each decision a name of its own, as with "
        "choose.under",
        "choose.one_of('x', [])": "x: expected at least 2 values; got []",
        "choose.float('x', 2, 1)": "x: expected low < high; got low = 2 and high = 1",
        "choose.float('x', 0, 1, log=True)": "x: expected low > 0 with scale = 'log'; got low = 0; use scale = "
        "'linear'",
        "choose.int('x', 1, choose.int('n', 2, 3))": "x: a path has one domain; got between 1 and ",
    }
    for number, (line, message) in enumerate(lines.items()):
        name = f"wrong{number}"
        (workplace / f"{name}.py").write_text(f"def space(choose):\n    batch = 3\n    {line}\n    return {{}}\n")
        space = make_space(f"{name}:space")
        with pytest.raises(RecipeError) as error:
            [space.sample(np.random.default_rng(seed)) for seed in range(20)]
        assert str(error.value).startswith(f"{name}:space: {message}")
        assert str(error.value).endswith(f" ({name}.py, line 3)")


def test_some_of_are_any_of_the_values() -> None:
    space = Space(lambda choose: {"on": choose.some_of("on", ["a", "b"])})
    found = {tuple(point.changes["on"]) for point in grid_points(space, 2)}
    assert found == {(), ("a",), ("b",), ("a", "b")}


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    branch=st.integers(1, 3),
    log=st.booleans(),
)
def test_count_and_enumeration_agree(sizes: list[int], branch: int, log: bool) -> None:
    def program(choose: Chooser) -> dict[str, Any]:
        some = [choose.int(f"n{place}", 1, size, log=log) for place, size in enumerate(sizes)]
        if some[0] == 1:  # one branch has more decisions
            some += [choose.one_of(f"m{place}", [1, 2, 3]) for place in range(branch)]
        return {"some": some}

    points = [json.dumps(point.genome.values()) for point in grid_points(Space(program), 6)]
    size = space_size(Space(program))
    assert len(set(points)) == len(points) == size.count
    assert size.exact


def test_a_size_is_told_in_words() -> None:
    def words(program: Any) -> str:
        return str(space_size(Space(program)))

    assert words(lambda choose: {"a": choose.int("a", 3, 3)}) == "1 candidate"
    assert words(lambda choose: {"a": choose.int("a", 1, 12_000)}) == "12,000 candidates"
    assert words(lambda choose: {"a": choose.int("a", 1, 30_000)}) == "about 3e+04 candidates"
    assert words(lambda choose: {"a": choose.int("a", 1, 10**7) * choose.int("b", 1, 10**7)}) == (
        "more than 10^12 candidates"
    )
    assert words(lambda choose: {"a": choose.float("a", 0, 1)}) == "more than 10^12 candidates, some real-valued"


FLOAT = {"type": "float", "low": 0, "high": 1}
WRONG_TABLES = [
    ({}, "search.space: expected at least one dimension"),
    (
        {"lr": 3},
        """search.space.lr: expected a dimension, as {type = "float", ...}; got 3""",
    ),
    (
        {"lr": {"type": "flot"}},
        "search.space.lr.type: no such type 'flot'; did you mean float? known: bool, choice, float, int, ordered",
    ),
    ({"optimizer": {"lr": {"type": "float", "low": 0}}}, "search.space.optimizer.lr.high: required, and not given"),
    (
        {"lr": {**FLOAT, "hihg": 2}},
        "search.space.lr.hihg: no such field; did you mean high? known: high, low, scale, step, type",
    ),
    (
        {"n": {"type": "int", "low": 1.5, "high": 3}},
        "search.space.n.low: expected a valid integer, got a number with a fractional part; got 1.5",
    ),
    (
        {"lr": {**FLOAT, "scale": "log"}},
        "search.space.lr: expected low > 0 with scale = 'log'; got low = 0; use scale = 'linear'",
    ),
    ({"lr": FLOAT, "optimizer": {}, "x.y": FLOAT, "x": {"y": FLOAT}}, "search.space.x.y: given twice"),
    (
        {"lr": {**FLOAT, "when": {"nam": "a"}}, "name": {"type": "choice", "values": ["a", "b"]}},
        "search.space.lr.when: expected an earlier dimension; got 'nam'; known: ",
    ),
    (
        {"name": {"type": "choice", "values": ["a", "b"]}, "lr": {**FLOAT, "when": {"name": "c"}}},
        "search.space.lr.when: name is never 'c'; it is one of 'a', 'b'",
    ),
    (
        {"lr": {**FLOAT, "when": "sgd"}},
        """search.space.lr.when: expected a table, as {optimizer.name = "sgd"}; got 'sgd'""",
    ),
]


@pytest.mark.parametrize(("table", "message"), WRONG_TABLES)
def test_tables_that_cannot_be(table: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        make_space(table)
    assert str(error.value) == message


def twice(choose: Chooser) -> dict[str, Any]:
    return {"a": choose.bool("x"), "b": choose.bool("x")}


def unsteady(choose: Chooser) -> dict[str, Any]:
    return {"a": choose.int("a", 1, 1 + choose.ordered("n", [1, 2]))}


WRONG_PROGRAMS = [
    (twice, "x: decided twice; give each decision a name of its own, as with choose.under"),
    (
        unsteady,
        "a: a path has one domain; got between 1 and 3, and then between 1 and 2; "
        "put what decides between them into the path",
    ),
    (lambda choose: {"a": choose.one_of("a", [])}, "a: expected at least 2 values; got []"),
    (lambda choose: {"a": choose.float("a", 2, 1)}, "a: expected low < high; got low = 2 and high = 1"),
    (
        lambda choose: {"a": choose.one_of("a", [1, {2}])},
        "a: expected numbers, text, lists and tables: Object of type set is not JSON serializable",
    ),
]


@pytest.mark.parametrize(("program", "message"), WRONG_PROGRAMS)
def test_functions_that_cannot_be(program: Any, message: str) -> None:
    space = Space(program)
    with pytest.raises(RecipeError) as error:
        [space.sample(np.random.default_rng(seed)) for seed in range(20)]
    assert str(error.value) == message


def test_a_replay_of_another_space_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^b: the genome has no value for this decision; it is of another space$"):
        Space(lambda choose: {"b": choose.bool("b")}).replay({"a": True})


def test_a_function_that_fails_is_named(workplace: Any) -> None:
    (workplace / "mine.py").write_text(
        "def space(choose):\n    return {'batch': 1 / 0}\n\nword = 'x'\ndef two(c): return 2\n"
    )
    rng = np.random.default_rng(0)
    with pytest.raises(RecipeError, match=r"^mine:space: ZeroDivisionError: division by zero \(mine.py, line 2\)$"):
        make_space("mine:space").sample(rng)
    with pytest.raises(RecipeError, match=r"^mine:two: expected a mapping of recipe fields to values; got 2$"):
        make_space("mine:two").sample(rng)
    for source, came in (("mine:word", "mine:word"), ("flat", "flat")):
        with pytest.raises(RecipeError) as error:
            make_space(source)
        assert str(error.value) == f"search.space: expected a table, or a function as module:attribute; got '{came}'"
