"""Parameter groups: by a recipe's rules, and by shape (hidden matrices, other matrices, vectors)."""

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
    decay_1d: bool,
    splits_hidden: bool,
) -> list[dict[str, Any]]:
    """Return the groups of the trainable parameters: first those without a rule, then those of each rule.

    Within each, matrices (two dimensions and more) come before vectors, which have no weight decay by default.

    Args:
        module: the model.
        rules: a parameter follows the first rule that matches it.
        arguments: options of the optimizer, which rules override.
        decay_1d: whether weight decay shrinks vectors too, where no rule says otherwise.
        splits_hidden: whether hidden matrices get groups of their own, with `hidden` = True.

    Raises:
        RecipeError: a rule matches no parameter.
    """
    names = _names(module)
    outer = embedding_and_head_parameters(module)
    every = (GroupRule(match="*"), *rules)  # index 0: parameters without a rule
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
        decayed = every[place].decay_1d
        if kind == VECTOR and "weight_decay" in arguments and not (decay_1d if decayed is None else decayed):
            own["weight_decay"] = 0.0
        groups.append({"params": parameters, **own, **({"hidden": kind == HIDDEN} if splits_hidden else {})})
    return groups


def embedding_and_head_parameters(module: nn.Module) -> set[Parameter]:
    """Return the parameters of embeddings and of the output head.

    The head is what `get_output_embeddings` of the module or a submodule returns, as in transformers, else the linear
    layer that was defined last.
    """
    parts = list(module.modules())
    ask: list[Any] = [getattr(part, "get_output_embeddings", None) for part in parts]
    heads: list[Any] = [head for head in (get() for get in ask if get is not None) if head is not None]
    outer = heads or [part for part in parts if isinstance(part, nn.Linear)][-1:]
    outer += [part for part in parts if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
    return {parameter for part in outer for parameter in part.parameters()}


def _names(module: nn.Module) -> dict[Parameter, list[str]]:
    """Return trainable parameter -> its names; a tied one has several."""
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
    """Check that every rule applies to a parameter.

    Raises:
        RecipeError: one does not.
    """
    every = [name for its_names in names for name in its_names]
    for place, rule in enumerate(rules):
        if place in used:
            continue
        field = f"optimizer.groups.{place}: match = {rule.match!r}"
        if _fits(rule, every):
            raise RecipeError(
                f"{field} matches only parameters of earlier rules, and the first match holds; reorder them"
            )
        nearest = difflib.get_close_matches(rule.match.replace("*", ""), every, n=NEAREST, cutoff=0.0)
        raise RecipeError(
            f"{field} matches none of the {len(every)} trainable parameters; the nearest: "
            f"{', '.join(nearest) or 'none'}"
        )
