"""Which parameters an optimizer treats alike: matrices and vectors, hidden matrices, and what a recipe's rules say."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn import Parameter

from raytrain.errors import RecipeError
from raytrain.optim.options import GroupRule

NEAREST = 5
HIDDEN, MATRIX, VECTOR = range(3)


def parameter_groups(
    module: nn.Module,
    rules: Sequence[GroupRule],
    arguments: Mapping[str, Any],
    *,
    decay_vectors: bool,
    splits_hidden: bool,
) -> list[dict[str, Any]]:
    """Return the groups of the trainable parameters: first those that no rule fits, then those of each rule.

    Within each, matrices (two dimensions and more) come before vectors, which weight decay leaves alone.

    Args:
        module: whose parameters.
        rules: the first that fits holds.
        arguments: the options of the optimizer where no rule says otherwise.
        decay_vectors: whether weight decay shrinks vectors too, where no rule says otherwise.
        splits_hidden: whether hidden matrices are to be groups of their own, marked `hidden`.

    Raises:
        RecipeError: a rule fits no parameter.
    """
    names = _names(module)
    outer = embedding_and_head_parameters(module)
    every = (GroupRule(match="*"), *rules)  # at place 0, for what no rule fits
    parts: dict[tuple[int, int], list[Parameter]] = {}
    for parameter, its_names in names.items():
        place = next((place for place, rule in enumerate(every[1:], start=1) if _fits(rule, its_names)), 0)
        wanted = getattr(every[place], "hidden", None)
        hidden = splits_hidden and parameter.dim() == 2 and (parameter not in outer if wanted is None else wanted)
        kind = HIDDEN if hidden else MATRIX if parameter.dim() >= 2 else VECTOR
        parts.setdefault((place, kind), []).append(parameter)
    _check_all_used(rules, {place - 1 for place, _ in parts}, names.values())
    groups = []
    for (place, kind), parameters in sorted(parts.items(), key=lambda part: part[0]):
        own = _options(every[place], arguments)
        decayed = every[place].decay_vectors
        if kind == VECTOR and "weight_decay" in arguments and not (decay_vectors if decayed is None else decayed):
            own["weight_decay"] = 0.0
        groups.append({"params": parameters, **own, **({"hidden": kind == HIDDEN} if splits_hidden else {})})
    return groups


def embedding_and_head_parameters(module: nn.Module) -> set[Parameter]:
    """Return the parameters of embeddings and of the output head.

    The head is what a `get_output_embeddings` in the module returns (models of transformers have one), else the last
    linear layer that was defined.
    """
    parts = list(module.modules())
    ask: list[Any] = [getattr(part, "get_output_embeddings", None) for part in parts]
    heads: list[Any] = [head for head in (get() for get in ask if get is not None) if head is not None]
    outer = heads or [part for part in parts if isinstance(part, nn.Linear)][-1:]
    outer += [part for part in parts if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
    return {parameter for part in outer for parameter in part.parameters()}


def _names(module: nn.Module) -> dict[Parameter, list[str]]:
    """Return each trainable parameter with its names; a tied one has several."""
    names: dict[Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    return names


def _fits(rule: GroupRule, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, rule.match) for name in names)


def _options(rule: GroupRule, arguments: Mapping[str, Any]) -> dict[str, Any]:
    own = rule.options()
    if "lr" in arguments:
        own["lr"] = own.get("lr", arguments["lr"]) * rule.lr_scale
    return own


def _check_all_used(rules: Sequence[GroupRule], used: set[int], names: Iterable[Sequence[str]]) -> None:
    """Check that every rule treats something.

    Raises:
        RecipeError: one does not.
    """
    every = [name for its_names in names for name in its_names]
    for place, rule in enumerate(rules):
        if place in used:
            continue
        field = f"optimizer.groups.{place}: match = {rule.match!r}"
        if _fits(rule, every):
            raise RecipeError(f"{field} fits only what earlier rules fit, and the first that fits holds; reorder them")
        near = difflib.get_close_matches(rule.match.replace("*", ""), every, n=NEAREST, cutoff=0.0)
        raise RecipeError(
            f"{field} fits none of the {len(every)} trainable parameters; the nearest: {', '.join(near) or 'none'}"
        )
