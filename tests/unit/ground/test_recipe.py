import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.errors import RecipeError
from raytrain.optim.options import OPTIMIZERS
from raytrain.overrides import apply_overrides, parse_overrides, parse_value
from raytrain.recipe import dotted_fields, read_toml
from raytrain.training.kind import KIND
from raytrain.training.recipe import TrainRecipe

SMALL = {"kind": "train", "task": {"name": "digits"}}


def test_a_section_with_a_name_can_be_its_name_alone() -> None:
    short = TrainRecipe.parse({**SMALL, "schedule": "wsd", "optimizer": "lion", "sync": "diloco"})
    named = {name: {"name": value} for name, value in (("schedule", "wsd"), ("optimizer", "lion"), ("sync", "diloco"))}
    assert short == TrainRecipe.parse({**SMALL, **named})
    with pytest.raises(RecipeError, match="checkpoint: expected a valid dictionary or instance of Checkpoint; got 'x'"):
        TrainRecipe.parse({**SMALL, "checkpoint": "x"})


fields = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**40),
        "workers": st.integers(1, 64),
        "steps": st.integers(1, 10**6),
        "clip": st.floats(0, 10),
        "precision": st.sampled_from(["float32", "bfloat16", "float64"]),
        "task.norm": st.sampled_from(["none", "batch", "layer"]),
        "task.widths": st.lists(st.integers(1, 9), min_size=1, max_size=3),
        "optimizer.name": st.sampled_from(["adamw", "adam", "nadam"]),
        "optimizer.lr": st.floats(1e-9, 1),
        "schedule.name": st.sampled_from(["constant", "linear", "cosine", "wsd"]),
        "checkpoint.keep": st.integers(1, 5),
        "evaluation.patience": st.integers(0, 5),
    },
)

nested = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3),
    max_leaves=8,
).filter(lambda value: isinstance(value, dict))


@given(fields)
def test_a_recipe_survives_being_written_and_read(changes: dict[str, Any]) -> None:
    recipe = TrainRecipe.parse(SMALL).with_overrides(changes)
    assert TrainRecipe.parse(tomllib.loads(recipe.to_toml())) == recipe


@given(fields, fields)
def test_overrides_come_one_after_the_other(first: dict[str, Any], second: dict[str, Any]) -> None:
    recipe = TrainRecipe.parse(SMALL)
    assert recipe.with_overrides(first).with_overrides(second) == recipe.with_overrides({**first, **second})


@given(nested, st.sampled_from(["a", "b.c", "d.a.b"]), st.integers())
def test_an_override_leaves_all_other_fields(raw: dict[str, Any], dotted: str, value: int) -> None:
    try:
        changed = dict(dotted_fields(apply_overrides(raw, {dotted: value})))
    except RecipeError:
        return  # it would have put a field inside a number
    before = dict(dotted_fields(raw))
    related = {
        field for field in before if f"{field}.".startswith(f"{dotted}.") or f"{dotted}.".startswith(f"{field}.")
    }
    assert changed.pop(dotted) == value
    assert {field: changed[field] for field in before.keys() - related} == {
        field: before[field] for field in before.keys() - related
    }


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.lists(st.integers()))
def test_values_are_read_as_toml(value: object) -> None:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    assert parse_value(text) == value


def test_what_is_not_toml_is_a_string() -> None:
    assert parse_overrides(["a=b c", "a.b=/x/y", "c=1", "c=2", "d="]) == {"a": "b c", "a.b": "/x/y", "c": 2, "d": ""}
    assert parse_overrides(["config.num-rounds=3"]) == {"config.num-rounds": 3}


BETAS = {"optimizer": {"name": "adamw", "lr": 0.1, "betas": [0.8, 0.9]}}
GROUPS = {"optimizer": {"name": "adamw", "groups": [{"match": "a", "eps": 1e-6, "lr_scale": 2}, {"match": "b"}]}}
SOURCE = {"task": {"name": "digits", "source": {"name": "ray", "actors": 2, "prefetch_bytes": 9}}}


@pytest.mark.parametrize(
    ("raw", "changes", "said"),
    [
        (BETAS, {"optimizer.name": "sgd"}, "optimizer.name=sgd: dropped optimizer.betas, which sgd does not take"),
        (BETAS, {"optimizer": "sgd"}, "optimizer.name=sgd: dropped optimizer.betas, which sgd does not take"),
        (BETAS, {"optimizer.name": "adan"}, "optimizer.name=adan: dropped optimizer.betas, which adan does not take"),
        (BETAS, {"optimizer.name": "adan", "optimizer.betas": [0.9, 0.9, 0.9]}, ""),
        (BETAS, {"optimizer.name": "adam"}, ""),
        (BETAS, {"optimizer.name": "adamw", "optimizer.lr": 0.2}, ""),
        ({"optimizer": {"betas": [0.8, 0.9]}}, {"optimizer.name": "adam"}, ""),  # of the default
        (
            {"optimizer": {"betas": [0.8, 0.9]}},
            {"optimizer.name": "lamb", "optimizer.lr": 0.1, "steps": 3},
            "",
        ),
        (
            GROUPS,
            {"optimizer.name": "sgd"},
            "optimizer.name=sgd: dropped optimizer.groups.0.eps, which sgd does not take",
        ),
        (
            SOURCE,
            {"task.source": "local"},
            "task.source.name=local: dropped task.source.actors, task.source.prefetch_bytes, which local does not take",
        ),
        (
            {"sync": {"name": "delayed-averaging", "every": 8, "alpha": 0.5}},
            {"sync.name": "co2"},
            "sync.name=co2: dropped sync.alpha, which co2 does not take",
        ),
    ],
)
def test_a_new_name_drops_the_options_that_only_the_old_one_has_and_says_which(
    raw: dict[str, Any], changes: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = json.dumps(raw)
    found = TrainRecipe.parse_with({**SMALL, **raw}, changes)
    assert [record.getMessage() for record in caplog.records] == ([said] if said else [])
    assert json.dumps(raw) == before
    assert found == TrainRecipe.parse({**SMALL, **raw}).with_overrides(changes)
    for section in ("optimizer", "sync"):
        kept = {key for key in raw.get(section, {}) if f"{section}.{key}" not in said} - {"name", "groups"}
        now = found.to_dict()[section]
        assert {key: now[key] for key in kept - {name.split(".")[-1] for name in changes}} == {
            key: raw[section][key] for key in kept - {name.split(".")[-1] for name in changes}
        }


def test_what_is_set_for_the_new_name_must_fit_it() -> None:
    with pytest.raises(RecipeError, match=r"^optimizer.betas: no such field; known: .*lr, maximize|.*momentum"):
        TrainRecipe.parse_with({**SMALL, **BETAS}, {"optimizer.name": "sgd", "optimizer.betas": [0.8, 0.9]})


@settings(max_examples=30)
@given(st.sampled_from(sorted(OPTIMIZERS)), st.sampled_from(sorted(OPTIMIZERS)))
def test_every_optimizer_can_take_the_place_of_every_other(old: str, new: str) -> None:
    recipe = TrainRecipe.parse({**SMALL, "optimizer": {"name": old, "lr": 0.01}})
    full = TrainRecipe.parse(recipe.to_dict())
    assert full.with_overrides({"optimizer.name": new}).optimizer.name == new


def test_entries_of_lists_can_be_changed() -> None:
    recipe = TrainRecipe.parse({**SMALL, **GROUPS, "task": {"name": "digits", "widths": [8, 9]}})
    changed = recipe.with_overrides(
        parse_overrides(["optimizer.groups.0.lr_scale=3", "optimizer.groups.1.match=*", "task.widths.1=5"])
    )
    assert [(rule.match, rule.lr_scale) for rule in changed.optimizer.groups] == [("a", 3), ("*", 1)]
    assert changed.to_dict()["task"]["widths"] == [8, 5]
    assert recipe.to_dict()["task"]["widths"] == [8, 9]


@given(st.lists(st.integers(), min_size=1, max_size=5), st.data())
def test_an_entry_that_is_changed_leaves_all_others(numbers: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(numbers) - 1))
    raw = {"a": {"b": [{"c": number} for number in numbers]}}
    found = apply_overrides(raw, {f"a.b.{place}.c": "x"})["a"]["b"]
    assert [one["c"] for one in found] == [*numbers[:place], "x", *numbers[place + 1 :]]
    assert raw == {"a": {"b": [{"c": number} for number in numbers]}}


def test_a_name_alone_stands_for_its_section() -> None:
    recipe = TrainRecipe.parse({"kind": "train", "task": "digits"})
    assert recipe.with_overrides({"task.model": "mlp"}).task.name == "digits"


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = TrainRecipe.parse({"kind": "train", "task": {"name": "text", "path": "x/../y.txt"}})
    assert recipe.to_dict()["task"]["path"] == str(tmp_path / "y.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("workers=two", r"^workers: expected a valid integer, unable to parse string as an integer; got 'two'$"),
        ("steps=0", r"^steps: expected greater than or equal to 1; got 0$"),
        ("wrokers=2", r"^wrokers: no such field; did you mean workers\? known: accumulate, .*workers, zo$"),
        ("optimizer.lrr=1", r"^optimizer.lrr: no such field; did you mean lr\? known: .*lr, name, weight_decay$"),
        ("task.modell=mlp", r"^task.modell: no such field; did you mean model\? known: depth, dropout, model, name, "),
        (
            "task.name=digit",
            r"^task.name: no such name 'digit'; did you mean digits\? known: causal-lm, classify, digits, instruct",
        ),
        ("optimizer.name=adamm", r"^optimizer.name: no such name 'adamm'; did you mean adam"),
        ("schedule.name=cosin", r"^schedule.name: no such name 'cosin'; did you mean cosine\?"),
        ("log.loggers=['tensorbord']", r"^log.loggers: no such name 'tensorbord'; did you mean tensorboard\?"),
        (
            "task.name=nowhere:task",
            r"^task.name: cannot import 'nowhere': ModuleNotFoundError: No module named 'nowhere'$",
        ),
        ("task.name=tomli_w:dmp", r"^task.name: 'tomli_w' has no 'dmp'; did you mean dump"),
        ("task.name=tomli_w:dump.x.y", r"^task.name: 'tomli_w' has no 'dump.x.y'; known: "),
        ("task.name=tomli_w:__name__.x", r"^task.name: 'tomli_w' has no '__name__.x'; known: capitalize, "),
        ("task.name=json:dump", r"^task.name: 'json' is a module of Python itself; name one of yours; got 'json:dump'"),
        ("task.name=a b:c", r"^task.name: expected module:attribute, as in mine:task; got 'a b:c'$"),
        (
            "task.name=raytrain.files:write_atomic",
            r"^task.name: raytrain.files:write_atomic must take nothing, or one parameter",
        ),
        (
            "task.name=tomli_w:dump",
            r"^tomli_w._writer:dump: its annotations cannot be read: NameError: name 'Any' is not defined$",
        ),
        (
            "task.name=tomli_w:_writer",
            r"^task.name: expected a raytrain.Task or a function that returns one; got <module",
        ),
        (
            "optimizer.name=tomli_w:dump",
            r"^optimizer.name: expected a class of torch.optim.Optimizer; got <function dump",
        ),
        ("optimizer.betas=[0.9]", r"^optimizer.betas.1: required, and not given$"),
        ("accumulate=0", r"^accumulate: expected greater than or equal to 1; got 0$"),
        (
            "optimizer.groups.2.lr_scale=2",
            r"^optimizer.groups.2.lr_scale: the list optimizer.groups has entries 0 to 0; got '2'$",
        ),
        ("optimizer.groups.x=2", r"^optimizer.groups.x: the list optimizer.groups has entries 0 to 0; got 'x'$"),
        ("log.loggers.0=mlflow", r"^log.loggers.0: the list log.loggers has no entries; got '0'$"),
        (
            "task.widths.0=2",
            r"^task.widths.0: the recipe sets no list task.widths, of which this could be an entry; set task.widths$",
        ),
        ("steps.0=1", r"^steps.0: steps is not a section but 10$"),
        ("optimizer.groups.0.lr_scal=2", r"^optimizer.groups.0.lr_scal: no such field; did you mean lr_scale\?"),
        ("seed=0x" + "f" * 9999, r"^seed: expected less than \d+; got a number that is too large to be shown$"),
        ("clip=[" + "1, " * 999 + "1]", r"^clip: expected a valid number; got \[1, 1, .* \.\.\.$"),
        ("steps.x=1", r"^steps.x: steps is not a section but 10$"),
        ("task=3", r"^task: expected a table with a name; known: causal-lm, classify, digits, instruct, text; got 3$"),
        ("sync.timeout_seconds=0", r"^sync.timeout_seconds: expected greater than 0; got 0$"),
        ("ema=1", r"^ema: expected less than 1; got 1$"),
    ],
)
def test_errors_name_the_field_and_the_way_out(change: str, message: str) -> None:
    raw = {**SMALL, "steps": 10, "log": {"loggers": []}, "optimizer": {"groups": [{"match": "*"}]}}
    with pytest.raises(RecipeError, match=message):
        TrainRecipe.parse(raw).with_overrides(parse_overrides([change]))


def test_all_wrong_fields_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        TrainRecipe.parse({**SMALL, "steps": "x", "batch": 0})
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["steps", "batch"]


def test_a_recipe_needs_a_task() -> None:
    with pytest.raises(RecipeError, match=r"^task: required, and not given$"):
        TrainRecipe.parse({"kind": "train"})


@pytest.mark.parametrize("word", ["steps", "=3", "a b=3", "a..b=3", "0=3", "0.a=3", "a.-1=3"])
def test_an_override_is_a_field_and_a_value(word: str) -> None:
    with pytest.raises(RecipeError, match="expected FIELD=VALUE, as in optimizer.lr=0.001"):
        parse_overrides([word])


def test_recipes_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    assert read_toml("digits", [KIND.recipes])[1].name == "digits.toml"
    with pytest.raises(
        RecipeError,
        match=r"^'digit' is neither a file, nor a run's folder with a recipe.toml, nor a shipped recipe, nor a task as "
        r"module:attribute; did you mean digits\?",
    ):
        read_toml("digit", [KIND.recipes])
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = ")
    with pytest.raises(RecipeError, match=r"broken.toml: not a TOML file: Invalid value"):
        read_toml(str(broken), [])


def test_recipes_are_frozen() -> None:
    recipe = TrainRecipe.parse(SMALL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.steps = 5  # type: ignore[misc]
