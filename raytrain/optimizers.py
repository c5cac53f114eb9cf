"""Optimizers by name, their options, and their state under the names of the parameters."""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar, Self

import torch
from pydantic import create_model, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from raytrain.errors import RecipeError
from raytrain.recipe import Options

OPTIMIZERS: dict[str, str] = {
    "sgd": "torch.optim:SGD",
    "adam": "torch.optim:Adam",
    "adamw": "torch.optim:AdamW",
    "nadam": "torch.optim:NAdam",
    "radam": "torch.optim:RAdam",
    "adagrad": "torch.optim:Adagrad",
    "rmsprop": "torch.optim:RMSprop",
    "adabelief": "pytorch_optimizer:AdaBelief",
    "adan": "pytorch_optimizer:Adan",
    "lamb": "pytorch_optimizer:Lamb",
    "lion": "pytorch_optimizer:Lion",
}

FUSED = {torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad}
"""Optimizers with one kernel for a whole step on CPUs and GPUs, which is used unless optimizer.fused says otherwise."""

NOT_OPTIONS = {"self", "params", "maximize", "capturable", "differentiable", "kwargs"}


class OptimizerOptions(Options):
    """What every optimizer takes beside the arguments of its constructor.

    Attributes:
        decay_vectors: whether weight decay also shrinks biases, norms and others of fewer than two dimensions.
    """

    constructor: ClassVar[type[Optimizer]]
    decay_vectors: bool = False

    @model_validator(mode="after")
    def _accepted(self) -> Self:
        try:
            make_optimizer(self.constructor, self, nn.Linear(2, 2))
        except RecipeError as error:
            raise ValueError(str(error)) from None
        return self


@cache  # equal recipes need equal classes
def options_of_optimizer(constructor: Any) -> type[Options]:
    """Return the options of an optimizer: the keyword arguments of its constructor, with their defaults.

    Raises:
        RecipeError: `constructor` is not an optimizer class.
    """
    if not (isinstance(constructor, type) and issubclass(constructor, Optimizer)):
        raise RecipeError(f"optimizer.name: expected a class of torch.optim.Optimizer; got {constructor!r}")
    fields: dict[str, Any] = {}
    for argument in inspect.signature(constructor).parameters.values():
        if argument.name not in NOT_OPTIONS:
            fields[argument.name] = (_type_of(argument.default), argument.default)
    options = create_model(f"{constructor.__name__}Options", __base__=OptimizerOptions, **fields)
    options.constructor = constructor
    return options


def make_optimizer(constructor: Callable[..., Optimizer], options: Options, module: nn.Module) -> Optimizer:
    """Return the optimizer of the trainable parameters of `module`.

    Matrices (two dimensions and more) and vectors are two groups, so that weight decay can leave the vectors alone.

    Raises:
        RecipeError: the constructor refuses its arguments.
    """
    arguments = options.model_dump(exclude={"name", "decay_vectors"})
    if arguments.get("fused", False) is None and constructor in FUSED:
        arguments["fused"] = True
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.dim() >= 2]
    vectors = [parameter for parameter in trainable if parameter.dim() < 2]
    spare = {} if getattr(options, "decay_vectors", False) or "weight_decay" not in arguments else {"weight_decay": 0.0}
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, **spare}]
    try:
        optimizer: Optimizer = constructor([group for group in groups if group["params"]], **arguments)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{options.name} refuses its options: {error}") from error
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # what a schedule multiplies
    return optimizer


def state_by_name(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Return the optimizer's state with each parameter's entries under the parameter's name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    return {
        "state": {names[parameter]: dict(entries) for parameter, entries in optimizer.state.items()},
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
    }


def load_state_by_name(optimizer: Optimizer, module: nn.Module, saved: Mapping[str, Any], options: Options) -> None:
    """Put what `state_by_name` returned back.

    Hyper-parameters that the recipe sets keep the recipe's values, so a run can be resumed with others; whatever else
    the optimizer keeps in its groups (an estimated distance, a count) comes from `saved`.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    standard = optimizer.state_dict()
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    ours = {*type(options).model_fields, "initial_lr", "params"}
    groups = [
        {**old, **{key: value for key, value in new.items() if key in ours}}
        for new, old in zip(standard["param_groups"], saved["groups"], strict=True)
    ]
    state = {index: saved["state"][name] for index, name in enumerate(order) if name in saved["state"]}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _type_of(default: Any) -> Any:
    """Return the type to check an option against: that of its default, with every number a float."""
    if default is inspect.Parameter.empty or default is None:
        return Any
    if isinstance(default, bool) or not isinstance(default, int | float | tuple):
        return type(default)
    return tuple[(float,) * len(default)] if isinstance(default, tuple) else float  # type: ignore[misc]
