"""Rules for groups of parameters, and which matrices are hidden."""

from typing import Any

import pytest
import torch
from torch import nn

from raytrain.errors import RecipeError
from raytrain.optim.groups import embedding_and_head_parameters
from raytrain.optim.optimizers import make_optimizer
from raytrain.optim.options import OPTIMIZERS
from raytrain.overrides import parse_overrides
from raytrain.registry import resolve
from raytrain.training.recipe import TrainRecipe


def model() -> nn.Module:
    return nn.ModuleDict(
        {"embed": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "body": nn.Linear(4, 4), "out": nn.Linear(4, 5)}
    )


def recipe(**optimizer: Any) -> TrainRecipe:
    return TrainRecipe.parse({"kind": "train", "task": "digits", "optimizer": optimizer})


def groups(module: nn.Module | None = None, **optimizer: Any) -> list[tuple[set[str], dict[str, Any]]]:
    module = module or model()
    options = recipe(**optimizer).optimizer
    made = make_optimizer(resolve(OPTIMIZERS, options.name, "optimizer.name"), options, module)
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [({names[parameter] for parameter in group["params"]}, group) for group in made.param_groups]


def test_without_rules_there_are_matrices_and_vectors() -> None:
    (matrices, decayed), (vectors, spared) = groups(weight_decay=0.1)
    assert matrices == {"embed.weight", "body.weight", "out.weight"}
    assert vectors == {"norm.weight", "norm.bias", "body.bias", "out.bias"}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_the_first_rule_that_fits_holds() -> None:
    rules = [
        {"match": "*.bias", "lr_scale": 2, "decay_1d": True},
        {"match": "o*", "lr": 0.5, "betas": [0.5, 0.6], "weight_decay": 0},
        {"match": "*embed*", "lr_scale": 0.1, "eps": 1e-3},
    ]
    found = groups(lr=0.2, weight_decay=0.1, groups=rules)
    assert [names for names, _ in found] == [
        {"body.weight"},
        {"norm.weight"},
        {"norm.bias", "body.bias", "out.bias"},
        {"out.weight"},
        {"embed.weight"},
    ]
    assert [group["lr"] for _, group in found] == [group["initial_lr"] for _, group in found]
    assert [group["lr"] for _, group in found] == pytest.approx([0.2, 0.2, 0.4, 0.5, 0.02])
    assert [group["weight_decay"] for _, group in found] == [0.1, 0.0, 0.1, 0.0, 0.1]
    assert [group["betas"] for _, group in found][3] == (0.5, 0.6)
    assert found[4][1]["eps"] == 1e-3


def test_a_tied_parameter_has_all_its_names() -> None:
    module = model()
    module["out"].weight = module["embed"].weight
    found = groups(module, groups=[{"match": "out.weight", "lr_scale": 0.5}])
    assert found[-1][0] == {"embed.weight"}


def test_rules_survive_being_written_and_read() -> None:
    changes = parse_overrides(["optimizer.groups=[{match='*.embed*', lr_scale=0.1, weight_decay=0}, {match='b'}]"])
    changed = recipe(name="muon").with_overrides(changes)
    assert changed.to_dict()["optimizer"]["groups"] == [
        {"match": "*.embed*", "lr_scale": 0.1, "weight_decay": 0.0},
        {"match": "b", "lr_scale": 1.0},
    ]
    assert TrainRecipe.parse(changed.to_dict()) == changed


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"match": "*", "lr_scal": 2}, r"^optimizer.groups.1.lr_scal: no such field; did you mean lr_scale\? known: "),
        ({"lr_scale": 2}, r"^optimizer.groups.1.match: required, and not given$"),
        ({"match": "*", "lr_scale": -1}, r"^optimizer.groups.1.lr_scale: expected greater than or equal to 0; got -1$"),
        ({"match": "*", "betas": 3}, r"^optimizer.groups.1.betas: expected a valid tuple; got 3$"),
        (
            {"match": "*.b", "betas": [2, 0.5]},
            r"^optimizer.groups.1.betas.0: expected less than 1; got 2$",
        ),
        ({"match": "*", "hidden": False}, r"^optimizer.groups.1.hidden: no such field"),
    ],
)
def test_a_wrong_rule_is_named(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(name="adamw", groups=[{"match": "*.a"}, rule])


def test_what_a_group_cannot_have_apart_is_named() -> None:
    message = (
        r"^optimizer: groups.0 \(match = 'x'\): adabelief has one n_sma_threshold for all parameters; set optimizer.n_"
    )
    with pytest.raises(RecipeError, match=message):
        recipe(name="adabelief", groups=[{"match": "x", "n_sma_threshold": 4}])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [{"match": "*"}, {"match": "*.embd*"}],
            r"^optimizer.groups.1: match = '\*.embd\*' matches none of the 7 trainable parameters; the nearest: embed",
        ),
        (
            [{"match": "*.weight"}, {"match": "body.weight"}],
            r"^optimizer.groups.1: match = 'body.weight' matches only parameters of earlier rules, and the first",
        ),
    ],
)
def test_a_rule_that_treats_nothing_is_an_error(rules: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        groups(groups=rules)


def test_hidden_matrices_are_neither_embeddings_nor_the_head() -> None:
    found = groups(name="muon")
    assert [(names, group["hidden"]) for names, group in found] == [
        ({"body.weight"}, True),
        ({"embed.weight", "out.weight"}, False),
        ({"norm.weight", "norm.bias", "body.bias", "out.bias"}, False),
    ]


def test_a_rule_can_say_what_is_hidden() -> None:
    rules = [{"match": "body.*", "hidden": False}, {"match": "out.*", "hidden": True, "weight_decay": 0.5}]
    found = {name: group for names, group in groups(name="muon", groups=rules) for name in names}
    assert {name for name, group in found.items() if group["hidden"]} == {"out.weight"}
    assert found["out.weight"]["weight_decay"] == 0.5
    assert found["out.bias"]["weight_decay"] == 0.0


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_transformers_says_what_its_head_is(tied: bool) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=6, tie_word_embeddings=tied)
    inner = AutoModelForCausalLM.from_config(config)
    module = nn.ModuleDict({"language": inner, "probe": nn.Linear(8, 2)})
    outer = {name for name, value in module.named_parameters() if value in embedding_and_head_parameters(module)}
    expected = {"language.transformer.wte.weight", "language.transformer.wpe.weight"}
    assert outer == expected | (set() if tied else {"language.lm_head.weight"})
    assert not torch.equal(inner.transformer.wte.weight, inner.transformer.wpe.weight[:1])
