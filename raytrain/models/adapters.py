"""Parameter-efficient fine-tuning: adapters of peft by name."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Self

import torch
from pydantic import create_model, model_validator
from torch import nn

from raytrain.errors import RecipeError
from raytrain.models.blocks import repeated_blocks
from raytrain.models.options import ADAPTERS, HEAD_PATTERNS, AdapterOptions
from raytrain.recipe import Options
from raytrain.registry import resolve, suggest

EXCLUDED_FIELDS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "modules_to_save",
}  # fmt: skip

UNTRAINED = "_raytrain_new"
"""Attribute that marks parameters without pretrained weights."""

RECIPE_TYPES = {str, int, float, bool, type(None), list, dict, ...}


class ConfigurationOptions(AdapterOptions):
    """The options of an adapter named as "module:attribute", validated by its configuration class."""

    @model_validator(mode="after")
    def _accepted(self) -> Self:
        try:
            peft_config(self)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name} refuses its options: {error}") from None
        return self


def peft_config(options: AdapterOptions) -> Any:
    """Return peft's configuration of an adapter; None without one."""
    given = options.model_dump(exclude={"name", "modules_to_save"}, exclude_unset=True)
    return resolve(ADAPTERS, options.name, "adapter.name")(**given)


def no_adapter() -> None:
    """Train the model's own parameters, without an adapter."""


@cache  # equal recipes need equal classes
def options_from_peft(config: Any) -> type[Options]:
    """Return a class of options with the fields of a peft configuration and their defaults.

    Raises:
        RecipeError: `config` is not a configuration of peft.
    """
    if not (inspect.isclass(config) and dataclasses.is_dataclass(config) and hasattr(config, "peft_type")):
        raise RecipeError(f"adapter.name: expected a configuration class of peft; got {config!r}")
    hints = typing.get_type_hints(config)
    fields: dict[str, Any] = {
        field.name: (hints[field.name], _default(field))
        for field in dataclasses.fields(config)
        if field.init and field.name not in EXCLUDED_FIELDS and _plain(hints[field.name])
    }
    return create_model(f"{config.__name__}Options", __base__=ConfigurationOptions, **fields)


def inject_adapter(module: nn.Module, options: AdapterOptions, seed: int) -> frozenset[str]:
    """Inject an adapter into a module in place, and freeze the base model.

    Without `target_modules` it is injected into every linear layer inside the model's repeated blocks.

    Returns:
        Names of the frozen parameters of the base model, which `Task.model` returns again and no checkpoint needs.
        Untrained parameters are not among them, even if they are frozen.

    Raises:
        RecipeError: the model has no layer for it, or an option does not fit the model.
    """
    config = peft_config(options)
    if config is None:
        return frozenset()
    from peft import inject_adapter_in_model  # noqa: PLC0415 - slow to import

    if getattr(config, "target_modules", None) is None:
        config.target_modules = _linear_layers(module)
    saved = {name for pattern in options.modules_to_save for name in _matching(module, pattern)}
    trained = [
        parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (name in saved or is_untrained(parameter))
    ]
    torch.manual_seed(seed)
    try:
        inject_adapter_in_model(config, module)
    # What peft raises for sizes, layers and patterns that do not fit the model; other errors are bugs.
    except (TypeError, ValueError, ZeroDivisionError, re.error) as error:
        raise RecipeError(f"adapter: {options.name} does not fit the model: {error}") from error
    for parameter in trained:
        parameter.requires_grad_(True)
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return frozenset(name for name, parameter in frozen.items() if not is_untrained(parameter))


def mark_untrained(parameters: Iterable[nn.Parameter]) -> None:
    """Mark parameters without pretrained weights, which `inject_adapter` leaves trainable."""
    for parameter in parameters:
        setattr(parameter, UNTRAINED, True)


def is_untrained(parameter: nn.Parameter) -> bool:
    """Return whether `mark_untrained` marked a parameter."""
    return getattr(parameter, UNTRAINED, False)


def merge_adapter(module: nn.Module) -> None:
    """Merge an adapter into its base layers in place, and remove it.

    Raises:
        RecipeError: merged weights would not be finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415 - slow to import

    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:
                raise RecipeError(f"the adapter of {name} cannot be merged: {error}") from error
            module.set_submodule(name, layer.get_base_layer())
    module.requires_grad_(True)


def _matching(module: nn.Module, pattern: str) -> list[str]:
    """Return the names of the parameters that match a pattern of `modules_to_save`.

    Raises:
        RecipeError: there are none, and it is not one of the usual patterns.
    """
    names = [name for name, _ in module.named_parameters()]
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found and pattern not in HEAD_PATTERNS:
        raise RecipeError(
            f"adapter.modules_to_save: {pattern!r} matches no parameter of the model; {suggest(pattern, names)}"
        )
    return found


def _linear_layers(module: nn.Module) -> list[str]:
    """Return the names of linear layers inside the repeated blocks, GPT-2's Conv1D included."""
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415 - slow to import

    names = {layer: name for name, layer in module.named_modules()}
    linear = (
        layer for block in repeated_blocks(module) for layer in block.modules() if isinstance(layer, nn.Linear | Conv1D)
    )
    inside = [names[layer] for layer in linear]
    if not inside:
        raise RecipeError(
            "adapter.target_modules: the model has no linear layers inside repeated blocks; name the layers to adapt, "
            f"as in adapter.target_modules=['{next((name for name, _ in module.named_modules() if name), 'layer')}']"
        )
    return inside


def _default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _plain(hint: Any) -> bool:
    """Return whether a recipe can represent values of a type."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return True
    return all(_plain(part) for part in inner) if inner else hint in RECIPE_TYPES
