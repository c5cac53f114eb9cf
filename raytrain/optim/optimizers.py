"""Makes optimizers, finds the options of the user's own, and keeps their state under the names of the parameters."""

import inspect
import math
from collections.abc import Mapping, Set
from functools import cache
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, create_model, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from raytrain.errors import RecipeError
from raytrain.optim.eager import without_compiler
from raytrain.optim.ema import averages_weights
from raytrain.optim.groups import parameter_groups
from raytrain.optim.options import OptimizerOptions, with_rules

FUSED = {torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad}
"""Optimizers with one kernel for a whole step on CPUs and GPUs, which is used unless optimizer.fused says otherwise."""

TRAITS = ("splits_hidden", "zeroth", "exact", "selects", "hybrid")
"""What a class of optimizers may say of itself, as `OptimizerOptions` describes it."""

EXCLUDED_ARGUMENTS = {"self", "params", "maximize", "capturable", "differentiable", "kwargs"}


class ConstructorOptions(OptimizerOptions):
    """The options of an optimizer of the user's, whose constructor is asked whether it takes them."""

    constructor: ClassVar[type[Optimizer]]

    @model_validator(mode="after")
    def _accepted(self) -> Self:
        self._tried(self.name, {})
        return self

    def _shared_options(self) -> Set[str]:
        own = type(self).model_fields.keys() - OptimizerOptions.model_fields.keys()
        return own - self._tried(self.name, {}).defaults.keys()

    def _check_rule(self, where: str, own: Mapping[str, Any]) -> None:
        self._tried(f"{where}: {self.name}", own)

    def _tried(self, what: str, changes: Mapping[str, Any]) -> Optimizer:
        """Return an optimizer of a small parameter with some options changed, to see whether it takes them."""
        parameters = [nn.Parameter(torch.zeros(2, 2))]
        try:
            return _construct(self.constructor, what, parameters, {**self.arguments(), **changes})
        except RecipeError as error:
            raise ValueError(str(error)) from None


@cache  # equal recipes need equal classes
def options_from_constructor(constructor: Any) -> type[OptimizerOptions]:
    """Return the options of an optimizer: the keyword arguments of its constructor, with their defaults.

    Raises:
        RecipeError: `constructor` is not an optimizer class.
    """
    if not (isinstance(constructor, type) and issubclass(constructor, Optimizer)):
        raise RecipeError(f"optimizer.name: expected a class of torch.optim.Optimizer; got {constructor!r}")
    fields: dict[str, Any] = {}
    for argument in inspect.signature(constructor).parameters.values():
        if argument.name not in EXCLUDED_ARGUMENTS:
            fields[argument.name] = (_type_of(argument), argument.default)
    options = create_model(f"{constructor.__name__}Options", __base__=ConstructorOptions, **fields)
    options.constructor = constructor
    options.fuses = constructor in FUSED
    options.averages = averages_weights(constructor)
    for trait in TRAITS:
        setattr(options, trait, bool(getattr(constructor, trait, False)))
    return with_rules(options)


def make_optimizer(constructor: type[Optimizer], options: OptimizerOptions, module: nn.Module) -> Optimizer:
    """Return the optimizer of the trainable parameters of `module`, in the groups of `parameter_groups`.

    Raises:
        RecipeError: the constructor refuses its arguments, or a rule of `options.groups` fits no parameter.
    """
    arguments = options.arguments()
    groups = parameter_groups(
        module,
        options.groups,
        arguments,
        decay_vectors=options.decay_vectors,
        splits_hidden=options.splits_hidden,
    )
    optimizer = _construct(constructor, options.name, groups, arguments)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # what a schedule multiplies
    return optimizer


def state_by_name(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Return the optimizer's state with each parameter's entries under the parameter's name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    return {
        "state": {names[parameter]: dict(entries) for parameter, entries in optimizer.state.items()},
        "groups": [
            {**group, "params": [names[parameter] for parameter in group["params"]]} for group in optimizer.param_groups
        ],
    }


def load_state_by_name(
    optimizer: Optimizer, module: nn.Module, saved: Mapping[str, Any], options: OptimizerOptions
) -> None:
    """Put what `state_by_name` returned back.

    Hyper-parameters that the recipe sets keep the recipe's values, so a run can be resumed with others, and in other
    groups; whatever else the optimizer keeps in its groups (an estimated distance, a count) comes from `saved`: from
    the group that a group's first parameter was in.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    standard = optimizer.state_dict()
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    ours = {*type(options).model_fields, "initial_lr", "params", "hidden"}
    was_in = {name: group for group in saved["groups"] for name in group["params"]}
    groups = []
    for new in standard["param_groups"]:
        old = was_in.get(order[new["params"][0]], {})
        groups.append({**new, **{key: value for key, value in old.items() if key not in ours}})
    state = {index: saved["state"][name] for index, name in enumerate(order) if name in saved["state"]}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def state_bytes(optimizer: Optimizer, module: nn.Module) -> dict[str, int]:
    """Return how many bytes of the optimizer's state each parameter has, by its name; none before the first step."""
    return {
        name: sum(entry.nbytes for entry in optimizer.state.get(parameter, {}).values() if isinstance(entry, Tensor))
        for name, parameter in module.named_parameters()
    }


def _construct(constructor: type[Optimizer], name: str, params: Any, arguments: dict[str, Any]) -> Optimizer:
    try:
        return without_compiler(constructor)(params, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{name} refuses its options: {error}") from error


def _type_of(argument: inspect.Parameter) -> Any:
    """Return the type to check an option against: that of its default; a number is a float unless it says int."""
    default = argument.default
    if default is inspect.Parameter.empty or default is None:
        return Any
    if isinstance(default, bool) or not isinstance(default, int | float | tuple):
        return type(default)
    if isinstance(default, tuple):
        return tuple[(float,) * len(default)]  # type: ignore[misc]
    if argument.annotation in (int, "int"):
        return int
    return float if math.isfinite(default) else Annotated[float, Field(allow_inf_nan=True)]
