"""Recipes of searches: what is read, what is refused and with which words."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytrain.errors import RecipeError
from raytrain.training.recipe import TrainRecipe
from search.checks import check_resume, check_shapes
from search.launch.base import check_search
from search.pbt.engine import PopulationBasedTraining
from search.pbt.exploit import Truncation
from search.pbt.explore import Perturb
from search.recipe import SearchRecipe
from search.scheduling.segments import Objective
from search.sweep.sweep import Sweep
from search.tables import SEARCHES

LR = {"type": "float", "low": 1e-4, "high": 0.1, "scale": "log"}
DROPOUT = {"type": "float", "low": 0, "high": 0.5, "step": 0.05}
RAW: dict[str, Any] = {
    "kind": "search",
    "name": "mine",
    "base": "digits",
    "search": {"name": "pbt", "population": 4, "interval": 100, "space": {"optimizer": {"lr": LR}}},
}


def parse(**changes: Any) -> SearchRecipe:
    return SearchRecipe.parse_with(RAW, {name.replace("__", "."): value for name, value in changes.items()})


def test_a_base_recipe_is_a_name_a_file_or_inline(tmp_path: Path) -> None:
    shipped = parse()
    assert isinstance(shipped.base, TrainRecipe)
    assert (shipped.base.name, shipped.base.steps) == ("digits", 600)
    file = tmp_path / "mine.toml"
    file.write_text(shipped.base.to_toml())
    assert parse(base=str(file)).base == shipped.base
    assert parse(base=shipped.base.to_dict()).base == shipped.base
    assert parse(base={"name": "digits", "steps": 300, "optimizer": {"lr": 0.5}}).base.optimizer.lr == 0.5
    assert parse(base__steps=300).base.steps == 300, "as --set base.steps=300"


def test_a_task_of_the_users_is_a_base_recipe(workplace: Path) -> None:
    (workplace / "mine.py").write_text("from raytrain.tasks.digits import digits, DigitsOptions\n")
    assert parse(base="mine:digits", base__steps=200).base.task.name == "mine:digits"


def test_a_recipe_survives_being_written_and_read() -> None:
    recipe = parse(
        search__first=[{"optimizer.lr": 0.01}],
        search__exploit={"name": "truncation", "top": 0.5},
        search__space__task={"dropout": DROPOUT},
    )
    again = SearchRecipe.parse(tomllib.loads(recipe.to_toml()))
    assert again == recipe
    assert again.search.exploit.top == 0.5


def test_overrides_reach_dimensions_and_the_base_recipe() -> None:
    recipe = parse().with_overrides({"search.space.optimizer.lr.low": 1e-3, "base.steps": 400, "search.population": 8})
    assert recipe.space().domains["optimizer.lr"].low == 1e-3
    assert (recipe.steps, recipe.search.population) == (400, 8)


def test_defaults_are_those_of_the_paper() -> None:
    search = parse().search
    assert isinstance(search.exploit, Truncation)
    assert isinstance(search.explore, Perturb)
    assert (search.inherit, search.synchronous, search.quorum) == ("both", True, 1.0)


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_makes_an_engine(name: str) -> None:
    engine = parse(search={"name": name, "space": {"optimizer": {"lr": LR}}}).scheduler(Objective("loss", "lower"))
    assert isinstance(engine, PopulationBasedTraining if name == "pbt" else Sweep)
    [work] = engine.ask(1)
    assert set(work.changes) == {"optimizer.lr"}
    assert work.until in (100, 600)


def test_trials_of_a_sweep_have_the_seed_of_the_base_recipe_and_members_have_their_own() -> None:
    def seeds(name: str) -> list[int]:
        section = {"name": name, "space": {"optimizer": {"lr": LR}}}
        works = parse(search=section, base__seed=7).scheduler(Objective("loss", "lower")).ask(4)
        return [work.seed for work in works]

    assert seeds("random") == [7] * 4
    assert len(set(seeds("pbt"))) == 4


def test_an_engine_knows_the_schedule_of_a_trial() -> None:
    search = {"name": "extrapolation", "law": "annealing", "space": {"optimizer": {"lr": LR}}}
    engine = parse(search=search).scheduler(Objective("loss", "lower"))
    rates = engine.problem.rates({"schedule.warmup": 3, "schedule.name": "constant"})
    assert rates == [0.25, 0.5, 0.75, *[1.0] * (engine.problem.steps - 3)]


def test_a_space_is_a_function_too(workplace: Path) -> None:
    (workplace / "mine.py").write_text(
        "def space(choose):\n    return {'optimizer.lr': choose.float('lr', 1e-4, 0.1, log=True)}\n"
    )
    recipe = parse(search__space="mine:space", search__first=[{"lr": 0.01}])
    assert recipe.scheduler(Objective("loss", "lower")).ask(1)[0].changes == {"optimizer.lr": 0.01}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"search": {"name": "pbt"}}, "search.space: required, and not given"),
    (
        {"search__name": "ptb"},
        "search.name: no such name 'ptb'; did you mean pbt? known: asha, evolution, extrapolation, gp, grid, "
        "hyperband, mcts, median, nars, pbt, random, sobol, tpe, or your own "
        "as module:attribute",
    ),
    (
        {"search__space__optimizer": {"lrr": LR}},
        "search.space.optimizer.lrr: the base recipe refuses optimizer.lrr = 0.0001: optimizer.lrr: no such field; did "
        "you mean lr? known: ",
    ),
    (
        {"search__space__task": {"dropout": {"type": "float", "low": 0.1, "high": 1.0}}},
        "search.space.task.dropout: the base recipe refuses task.dropout = 1.0: task.dropout: expected less than 1; "
        "got 1.0",
    ),
    (
        {"search__space__batch": {"type": "int", "low": 0, "high": 8}},
        "search.space.batch: the base recipe refuses batch = 0: batch: expected greater than or equal to 1; got 0",
    ),
    (
        {"search__space__schedule": {"name": {"type": "choice", "values": ["linear", "cosin"]}}},
        "search.space.schedule.name: the base recipe refuses schedule.name = 'cosin': schedule.name: no such name "
        "'cosin'; did you mean cosine? known: ",
    ),
    (
        {"search__space__optimizer": {"lr": {**LR, "low": 1}}},
        "search.space.optimizer.lr: expected low < high; got low = 1 and high = 0.1",
    ),
    (
        {"search__space__optimizer": {"lr": {**LR, "low": 0}}},
        "search.space.optimizer.lr: expected low > 0 with scale = 'log'; got low = 0; use scale = 'linear'",
    ),
    (
        {"search__first": [{"optimizer.lr": 0.01}, {"optimizer.lr": 0.5}]},
        "search.first.1.optimizer.lr: expected between 0.0001 and 0.1 (log); got 0.5",
    ),
    ({"search__first": [{"lr": 0.01}]}, "search.first.0.lr: not searched; known: optimizer.lr"),
    (
        {"search__first": [{"task.dropout": 0}], "search__space__task": {"dropout": {**DROPOUT, "step": 0}}},
        "search.first.0.task.dropout: no factor leads away from 0; give search.space.task.dropout a step, which is "
        "added, or set search.explore = 'resample'",
    ),
    ({"search__interval": 7}, "search.interval: expected a divisor of base.steps = 600; got 7"),
    ({"search__population": 1}, "search.population: expected greater than or equal to 2; got 1"),
    (
        {"search__population": 3},
        "search.exploit: expected at least 4 members with truncation; got 3; tournament takes 2",
    ),
    (
        {"search__population": 4, "search__first": [{}] * 5},
        "search.population: expected at least 5, one for each guess in first; got 4",
    ),
    (
        {"search__exploit": "trunctation"},
        "search.exploit.name: no such name 'trunctation'; did you mean truncation? known: mf-pbt, none, tournament, "
        "truncation, welch, or your own as module:attribute",
    ),
    (
        {"search__exploit": {"name": "truncation", "top": 0.6}},
        "search.exploit.top: expected less than or equal to 0.5; got 0.6",
    ),
    (
        {"search__exploit": "search.space:Space"},
        "search.exploit: expected a subclass of search.pbt.exploit.Exploit; got <class 'search.space.Space'>",
    ),
    ({"search__explore": {"name": "perturb", "factor": 1}}, "search.explore.factor: expected greater than 1; got 1"),
    (
        {"search__step_matched": True},
        "search.step_matched: expected false with synchronous = true, where all members are at one step",
    ),
    ({"search__mode": "lowest"}, "search.mode: expected '', 'min' or 'max'; got 'lowest'"),
    ({"search__trials": 3}, "search.trials: no such field; known: burn_in, exploit, "),
    (
        {"search": {"name": "asha", "interval": 600, "space": {"optimizer": {"lr": LR}}}},
        "search.interval: expected less than base.steps = 600; got 600",
    ),
    ({"base": "digts"}, "'digts' is neither a file, nor a run's folder with a recipe.toml, nor a shipped recipe"),
    ({"base": {"steps": 3}}, "base: expected the name of a recipe or a file, or a table with a name or a kind"),
    ({"base": {"kind": "search"}}, "base.kind: no such kind 'search'; known: "),
    ({"base__steps": 0}, "base.steps: expected greater than or equal to 1; got 0"),
    ({"base__optimizer": "adamv"}, "base.optimizer.name: no such name 'adamv'; did you mean "),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:50] for _, message in WRONG])
def test_wrong_input_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse(**changes)
    assert str(error.value).startswith(message)


def test_no_factor_leads_across_zero(workplace: Path) -> None:
    (workplace / "mine.py").write_text(
        "def space(choose):\n    return {'optimizer.lr': choose.float('lr', -1, 1) ** 2 + 1e-6}\n"
    )
    with pytest.raises(RecipeError) as error:
        parse(search__space="mine:space")
    assert str(error.value) == (
        "search.space.lr: no factor leads across 0, which is between -1 and 1; give the dimension a step, which is "
        "added, or set search.explore = 'resample'"
    )
    assert parse(search__space="mine:space", search__explore="resample").search.explore.name == "resample"


def test_a_function_whose_values_are_refused(workplace: Path) -> None:
    (workplace / "mine.py").write_text("def space(choose):\n    return {'batch': choose.int('batch', -3, -1)}\n")
    with pytest.raises(
        RecipeError,
        match=r"^search.space: the base recipe refuses batch = -\d \(mine.py, line 2\): batch: expected greater",
    ):
        parse(search__space="mine:space")


def test_all_fields_that_a_function_has_wrong_are_named_with_their_lines(workplace: Path) -> None:
    (workplace / "mine.py").write_text(
        "def space(choose):\n"
        "    return {\n"
        "        'batch': choose.one_of('batch', [0, -1]),\n"
        "        'task.nrm': choose.one_of('norm', ['none', 'none2']),\n"
        "    }\n"
    )
    with pytest.raises(RecipeError) as error:
        parse(search__space="mine:space")
    first, second = sorted(str(error.value).splitlines())
    assert first.startswith("search.space: the base recipe refuses batch = ")
    assert " (mine.py, line 3): batch: expected greater than or equal to 1; got " in first
    assert second.startswith("search.space: the base recipe refuses task.nrm = 'none")
    assert " (mine.py, line 4): task.nrm: no such field; did you mean norm? known: " in second


def test_a_space_is_short_for_a_search(workplace: Path) -> None:
    """The fields as the command line sets them: `raytrain search mine:space recipe=digits search.budget=40`."""
    (workplace / "mine.py").write_text("def space(choose):\n    return {'batch': choose.int('batch', 1, 4)}\n")
    raw = {"kind": "search", "name": "space", "search": {"space": "mine:space"}}
    recipe = SearchRecipe.parse_with(raw, {"recipe": "digits", "recipe.steps": 20, "search.budget": 40})
    assert (recipe.search.name, recipe.members, recipe.steps, recipe.base.name) == ("gp", 40, 20, "digits")
    assert SearchRecipe.parse_with(raw, {"recipe": "digits", "search.name": "tpe"}).search.name == "tpe"
    assert SearchRecipe.parse_with(raw, {"recipe": "digits", "base.steps": 20}).base == recipe.base
    assert SearchRecipe.parse(tomllib.loads(recipe.to_toml())) == recipe
    with pytest.raises(RecipeError) as error:
        SearchRecipe.parse_with(raw, {"search.budget": 40})
    assert str(error.value) == "base: expected the recipe whose fields are searched, as in recipe=digits; got none"
    with pytest.raises(RecipeError) as error:
        SearchRecipe.parse_with(raw, {"recipe": "digits", "search.budget": 1, "search.first": [{}, {"batch": 2}]})
    assert str(error.value) == "search.trials: expected at least 2, one for each guess in first; got 1"


def test_a_limit_counts_the_parameters_of_the_model(workplace: Path) -> None:
    (workplace / "mine.py").write_text(
        "def space(choose):\n    return {'task.widths': [choose.ordered('width', [8, 64]), choose.int('last', 1, 9)]}\n"
    )
    section = {"name": "random", "space": "mine:space", "limits": {"parameters": 1000}}
    recipe = parse(search=section, base__task={"name": "digits", "model": "mlp", "norm": "none"})
    for work in recipe.scheduler(Objective("loss", "lower")).ask(9):
        [first, last] = work.changes["task.widths"]
        assert first == 8
        model = shapes(recipe.base.with_overrides(dict(work.changes)))
        assert sum(np.prod(shape) for shape in model.values()) == 64 * 8 + 8 + 9 * last + 10 * last + 10
    with pytest.raises(RecipeError) as error:
        check_search(recipe.with_overrides({"search.limits.parameters": 100}))
    assert str(error.value) == "search.limits.parameters: none of 10,000 draws has at most 100; the smallest has 549"
    with pytest.raises(RecipeError) as error:
        check_search(recipe.with_overrides({"search.first": [{"last": 2}, {"width": 64}]}))
    assert str(error.value) == "search.first.1: over a limit of search.limits, with width = 64"


@pytest.mark.parametrize(
    ("space", "base"),
    [
        ("digits:mlp", "digits"),
        ("digits:cnn", "digits"),
        ("text:gpt", "stdlib-lm"),
        ("text:llama", "stdlib-lm"),
        ("text:rnn", "stdlib-lm"),
        ("classify:fine_tuning", "sst2-minilm"),
    ],
)
def test_ready_spaces_fit_their_tasks(space: str, base: str) -> None:
    recipe = SearchRecipe.parse({"kind": "search", "base": base, "search": {"space": f"search.spaces.{space}"}})
    for seed in range(40):
        changes = dict(recipe.space().sample(np.random.default_rng(seed)).changes)
        assert recipe.base.with_overrides(changes).to_dict() != recipe.base.to_dict()


def test_values_are_tried_under_their_conditions() -> None:
    table = {
        "name": {"type": "choice", "values": ["adamw", "sgd"]},
        "momentum": {"type": "float", "low": 0.5, "high": 0.99, "when": {"optimizer.name": "sgd"}},
    }
    base = {"kind": "train", "steps": 600, "task": "digits"}
    assert parse(base=base, search__space__optimizer=table)
    without = {**table, "momentum": {**table["momentum"], "when": {}}}
    with pytest.raises(
        RecipeError, match=r"^search.space.optimizer.momentum: the base recipe refuses optimizer.momentum"
    ):
        parse(base=base, search__space__optimizer=without)


def test_metrics_that_the_task_does_not_measure() -> None:
    assert parse().objective("accuracy", "higher", {"accuracy", "loss"}) == Objective("accuracy", "higher")
    recipe = parse(search__metric="loss")
    with pytest.raises(RecipeError) as error:
        recipe.objective("accuracy", "higher", {"accuracy", "loss"})
    assert str(error.value) == (
        "search.mode: required with the metric 'loss', which is not the task's own (accuracy); min or max"
    )
    assert parse(search__metric="loss", search__mode="min").objective("accuracy", "higher") == Objective(
        "loss", "lower"
    )
    with pytest.raises(RecipeError) as error:
        parse(search__metric="lose").objective("accuracy", "higher", {"accuracy", "loss"})
    assert (
        str(error.value) == "search.metric: the task does not measure 'lose'; did you mean loss? known: accuracy, loss"
    )


def shapes(recipe: Any) -> dict[str, tuple[int, ...]]:
    from raytrain.training.build import build_task

    return {name: tuple(each.shape) for name, each in build_task(recipe).model(0).named_parameters()}


def test_shapes_that_cannot_be_inherited() -> None:
    table = {"task": {"depth": {"type": "int", "low": 1, "high": 2}}, "optimizer": {"lr": LR}}
    recipe = parse(search__space=table)
    with pytest.raises(RecipeError) as error:
        check_shapes(recipe.base, recipe.search, shapes)
    assert str(error.value) == (
        "search.space.task.depth: task.depth = 2 changes the shape of 4.weight from (64, 32, 3, 3) to (32, 32, 3, 3), "
        "and weights of another shape cannot be inherited; set search.other_shapes = 'overlap', with which they "
        "are inherited in part, or search.inherit = 'hyperparameters'"
    )
    fine = [parse(), parse(search__space=table, search__inherit="hyperparameters")]
    for one in [*fine, parse(search={"name": "random", "space": table})]:
        check_shapes(one.base, one.search, shapes)


def test_bounds_can_change_on_resume_and_dimensions_cannot() -> None:
    table = {"optimizer": {"lr": LR}, "task": {"dropout": DROPOUT}}
    before = parse(search__space=table).search

    def problem(**changes: Any) -> str:
        with pytest.raises(RecipeError) as error:
            check_resume(before, parse(**{"search__space": table, **changes}).search)
        return str(error.value)

    check_resume(before, parse(search__space={**table, "optimizer": {"lr": {**LR, "low": 1e-3, "high": 1}}}).search)
    check_resume(before, parse(search__space=table, search__timeout_seconds=5, search__first=[{}]).search)
    end = "; bounds and values can change, or begin a new search"
    assert problem(search__space={"optimizer": table["optimizer"]}) == (
        f"search.space.task.dropout: removed since the search began{end}"
    )
    batch = {"type": "int", "low": 8, "high": 16}
    assert problem(search__space={**table, "batch": batch}) == f"search.space.batch: added since the search began{end}"
    retyped = {**table, "task": {"dropout": {"type": "ordered", "values": [0.0, 0.1]}}}
    assert problem(search__space=retyped) == (
        f"search.space.task.dropout: a dimension of type float when the search began, and now ordered{end}"
    )
    assert problem(search__population=8) == "search.population: expected 4, with which the search began; got 8"
