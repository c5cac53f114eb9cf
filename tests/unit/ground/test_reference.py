"""The reference of fields, and what is completed of them."""

from pathlib import Path

import pytest

from raytrain import reference
from raytrain.cli.completion import SCRIPTS, complete
from raytrain.cli.main import _add_kinds, app
from raytrain.errors import RecipeError
from raytrain.habits import HABITS
from raytrain.kinds import load_kind, load_kinds
from raytrain.recipe import dotted_fields
from raytrain.reference import explain_field, recipe_fields, reference_page
from raytrain.training.recipe import TrainRecipe

PAGE = Path(reference.__file__).parent / "docs" / "recipes.md"


def test_the_page_is_what_the_classes_say() -> None:
    assert PAGE.read_text() == reference_page(load_kinds()), "raytrain explain --all > raytrain/docs/recipes.md"


def test_every_field_of_a_resolved_recipe_is_explained() -> None:
    names = {field.name for field in recipe_fields(load_kind("train"))}
    resolved = TrainRecipe.parse({"kind": "train", "task": "digits"}).to_dict()
    assert {name for name, _ in dotted_fields(resolved)} <= names
    unexplained = [field.name for field in recipe_fields(load_kind("train")) if not (field.meaning and field.type)]
    assert unexplained == []


def test_habits_lead_to_fields() -> None:
    known = {field.name for kind in load_kinds().values() for field in recipe_fields(kind)}
    assert set(HABITS.values()) <= known


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("optimizer.lr", "optimizer.lr"),
        ("learning_rate", "optimizer.lr"),
        ("gradient_accumulation_steps", "accumulate"),
        ("max_steps", "steps"),
        ("epochs", "epochs"),
        ("sync", "sync.name"),
        ("rounds", "rounds"),
    ],
)
def test_a_field_is_found_by_its_name_and_by_others(name: str, field: str) -> None:
    assert {found.name for _, found in explain_field(name)} == {field}


def test_options_of_components_differ_by_component() -> None:
    by_owner = {found.owner: found for _, found in explain_field("optimizer.betas")}
    [lion] = [found for owner, found in by_owner.items() if owner == "lion"]
    assert (lion.type, lion.default) == ("list of number", "[0.9, 0.99]")
    [(_, bound)] = explain_field("seed")
    assert bound.type == "integer >= 0, < 2^63"
    with pytest.raises(RecipeError, match=r"optimiser.lr: no such field; did you mean optimizer.lr.*\? raytrain expl"):
        explain_field("optimiser.lr")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"lr": 1}, "lr: no such field; did you mean optimizer.lr? known: "),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: no such field; did you mean accumulate? "),
        ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate: no such field; did you mean optimizer.lr? "),
    ],
)
def test_an_unknown_field_is_known_from_elsewhere(raw: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        TrainRecipe.parse({"kind": "train", "task": "digits", **raw})
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["tra"], ["train "]),
        (["train", "dig"], ["digits "]),
        (["check", "digits-f"], ["digits-fedavg ", "digits-fedkseed "]),
        (["list", "adap"], ["adapters "]),
        (["explain", "schedule.w"], ["schedule.warmup"]),
        (["train", "digits", "schedule.w"], ["schedule.warmup="]),
        (["train", "digits", "precision", "=", "bf"], ["bfloat16 "]),
        (["train", "digits", "sync.name", "=", "dil"], ["diloco "]),
        (["train", "digits", "sync="], ["co2 ", "cocod ", "ddp ", "delayed-averaging ", "diloco ", "fsdp "]),
        (["train", "digits", "schedule", "=", ""], ["constant ", "cosine ", "linear ", "wsd "]),
        (["federate", "digits-fedavg", "strategy", "=", "Krum"], ["Krum "]),
        (["copy", "digits", "x"], []),
    ],
)
def test_words_are_completed_as_bash_divides_them(words: list[str], found: list[str]) -> None:
    _add_kinds()
    assert complete(app, words, "bash")[: len(found) or None] == found


def test_zsh_completes_whole_words() -> None:
    assert complete(app, ["train", "digits", "compile=ind"], "zsh") == ["compile=inductor "]
    assert "bashcompinit" in SCRIPTS["zsh"]
