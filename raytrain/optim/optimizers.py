"""Construct optimizers, derive options from constructors, and save state by parameter name."""

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
"""Optimizers with a fused implementation on CPUs and GPUs, used unless optimizer.fused = false."""

TRAITS = ("splits_hidden", "zeroth", "exact", "selects", "hybrid")
"""Class attributes of an optimizer that are copied to its options; see `OptimizerOptions`."""

EXCLUDED_ARGUMENTS = {"self", "params", "maximize", "capturable", "differentiable", "kwargs"}


class ConstructorOptions(OptimizerOptions):
    """The options of a user's optimizer, validated by its constructor."""

    constructor: ClassVar[type[Optimizer]]

    @model_validator(mode="after")
    def _accepted(self) -> Self:
        self._try_construct(self.name, {})
        return self

    def _shared_options(self) -> Set[str]:
        own = type(self).model_fields.keys() - OptimizerOptions.model_fields.keys()
        return own - self._try_construct(self.name, {}).defaults.keys()

    def _check_rule(self, where: str, own: Mapping[str, Any]) -> None:
        self._try_construct(f"{where}: {self.name}", own)

    def _try_construct(self, what: str, changes: Mapping[str, Any]) -> Optimizer:
        """Construct the optimizer on a small parameter with some options changed, to validate them."""
        parameters = [nn.Parameter(torch.zeros(2, 2))]
        try:
            return _construct(self.constructor, what, parameters, {**self.arguments(), **changes})
        except RecipeError as error:
            raise ValueError(str(error)) from None


@cache  # equal recipes need equal classes
def options_from_constructor(constructor: Any) -> type[OptimizerOptions]:
    """Return a class of options from the keyword arguments of an optimizer's constructor.

    Raises:
        RecipeError: `constructor` is not a class of `torch.optim.Optimizer`.
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
    """Construct an optimizer of the trainable parameters of a module, in the groups of `parameter_groups`.

    Raises:
        RecipeError: the constructor refuses its arguments, or a rule of `options.groups` matches no parameter.
    """
    arguments = options.arguments()
    groups = parameter_groups(
        module,
        options.groups,
        arguments,
        decay_1d=options.decay_1d,
        splits_hidden=options.splits_hidden,
    )
    optimizer = _construct(constructor, options.name, groups, arguments)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # which a schedule multiplies
    if isinstance(optimizer, torch.optim.SGD):
        optimizer.register_step_pre_hook(_begin_momenta)
    return optimizer


def _begin_momenta(optimizer: Optimizer, *_: Any) -> None:
    """Begin at 0 the momenta that some parameters lack, as those that were frozen: a fused step takes all or none."""
    for group in optimizer.param_groups:
        stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
        lacking = [each for each in stepped if optimizer.state.get(each, {}).get("momentum_buffer") is None]
        if group["fused"] and len(lacking) < len(stepped):
            for parameter in lacking:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def state_bytes(optimizer: Optimizer, module: nn.Module) -> dict[str, int]:
    """Return name -> bytes of optimizer state of each parameter; 0 before the first step."""
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
    """Return the type of an option: that of its default; numbers are floats unless annotated as int."""
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
