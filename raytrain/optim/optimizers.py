"""Optimizers by name, their options, and their state under the names of the parameters."""

import inspect
import math
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, create_model, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from raytrain.errors import RecipeError
from raytrain.optim.eager import eager
from raytrain.optim.groups import GroupRule, parameter_groups
from raytrain.recipe import Options

OPTIMIZERS: dict[str, str] = {
    "sgd": "torch.optim:SGD",
    "adam": "torch.optim:Adam",
    "adamw": "torch.optim:AdamW",
    "nadam": "torch.optim:NAdam",
    "nadamw": "raytrain.optim.extras:NAdamW",
    "radam": "torch.optim:RAdam",
    "adagrad": "torch.optim:Adagrad",
    "rmsprop": "torch.optim:RMSprop",
    "adabelief": "pytorch_optimizer:AdaBelief",
    "adan": "pytorch_optimizer:Adan",
    "lamb": "raytrain.optim.extras:Lamb",
    "lion": "pytorch_optimizer:Lion",
    "prodigy": "pytorch_optimizer:Prodigy",
    "schedulefree": "pytorch_optimizer:ScheduleFreeAdamW",
    "sgdsai": "raytrain.optim.extras:SGDSaI",
    "muon": "raytrain.optim.matrices:Muon",
    "galore": "raytrain.optim.matrices:GaLore",
    "fira": "raytrain.optim.matrices:Fira",
}

ZEROTH: dict[str, str] = {
    "zo-sgd": "raytrain.optim.zeroth:ZOSGD",
    "zo-sgd-sign": "raytrain.optim.zeroth:ZOSign",
    "zo-sgd-conservative": "raytrain.optim.zeroth:ZOConservative",
    "zo-sgd-momentum": "raytrain.optim.zeroth:ZOMomentum",
    "zo-adam": "raytrain.optim.zeroth:ZOAdam",
    "zo-hybrid": "raytrain.optim.zeroth:ZOHybrid",
    "forward-gradient": "raytrain.optim.zeroth:ForwardGradient",
}
"""Optimizers that take slopes along directions, and no gradients."""

ALL = OPTIMIZERS | ZEROTH

WHOLE = frozenset({"lamb", "prodigy", "sgdsai", "muon", "galore", "fira"})
"""Optimizers that look at a parameter as a whole: on shards of it they take other steps. All others go by elements."""

ONE_RATE = frozenset({"prodigy"})
"""Optimizers that find one learning rate for all parameters, which no group can have apart."""

FUSED = {torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad}
"""Optimizers with one kernel for a whole step on CPUs and GPUs, which is used unless optimizer.fused says otherwise."""

NOT_OPTIONS = {"self", "params", "maximize", "capturable", "differentiable", "kwargs"}


class OptimizerOptions(Options):
    """What every optimizer takes beside the arguments of its constructor.

    Attributes:
        decay_vectors: whether weight decay also shrinks biases, norms and others of fewer than two dimensions.
        gradient_noise: variance of the Gaussian noise that is added to the gradient, after clipping; 0: none.
        gradient_noise_decay: after t steps that variance is divided by (1 + t) to this power.
        groups: rules for some of the parameters; see `GroupRule`.
    """

    constructor: ClassVar[type[Optimizer]]
    decay_vectors: bool = False
    gradient_noise: float = Field(0.0, ge=0)
    gradient_noise_decay: float = Field(0.55, ge=0)
    groups: tuple[GroupRule, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """Return what the constructor takes."""
        arguments = self.model_dump(exclude=set(OptimizerOptions.model_fields))
        if arguments.get("fused", False) is None and not arguments["foreach"] and self.constructor in FUSED:
            arguments["fused"] = True
        return arguments

    @model_validator(mode="after")
    def _accepted(self) -> Self:
        try:
            shared = _tried(self.constructor, self.name, self.arguments())
            for place, rule in enumerate(self.groups):
                self._check_rule(f"groups.{place} (match = {rule.match!r})", rule, shared.defaults)
        except RecipeError as error:
            raise ValueError(str(error)) from None
        return self

    def _check_rule(self, where: str, rule: GroupRule, per_group: Mapping[str, Any]) -> None:
        """Check that the constructor would take the options of a rule, and that they can differ between groups."""
        own = rule.options()
        if self.name in ONE_RATE and (rule.lr_scale != 1 or "lr" in own):
            raise RecipeError(f"{where}: {self.name} finds one learning rate for all parameters; leave lr_scale out")
        if shared := sorted(own.keys() - per_group.keys()):
            raise RecipeError(f"{where}: {self.name} has one {shared[0]} for all parameters; set optimizer.{shared[0]}")
        _tried(self.constructor, f"{where}: {self.name}", self.arguments() | own)


@cache  # equal recipes need equal classes
def options_of_optimizer(constructor: Any) -> type[OptimizerOptions]:
    """Return the options of an optimizer: the keyword arguments of its constructor, with their defaults.

    Raises:
        RecipeError: `constructor` is not an optimizer class.
    """
    if not (isinstance(constructor, type) and issubclass(constructor, Optimizer)):
        raise RecipeError(f"optimizer.name: expected a class of torch.optim.Optimizer; got {constructor!r}")
    fields: dict[str, Any] = {}
    for argument in inspect.signature(constructor).parameters.values():
        if argument.name not in NOT_OPTIONS:
            fields[argument.name] = (_type_of(argument), argument.default)
    apart: dict[str, Any] = {name: (kind if kind is Any else kind | None, None) for name, (kind, _) in fields.items()}
    if _splits_hidden(constructor):
        apart["hidden"] = (bool | None, None)
    rule: Any = create_model(f"{constructor.__name__}Group", __base__=GroupRule, **apart)
    fields["groups"] = (tuple[rule, ...], ())
    options = create_model(f"{constructor.__name__}Options", __base__=OptimizerOptions, **fields)
    options.constructor = constructor
    return options


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
        splits_hidden=_splits_hidden(constructor),
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


def is_elementwise(name: str) -> bool:
    """Return whether an optimizer steps on each number of a parameter by itself, and so on shards as on the whole."""
    return name in OPTIMIZERS and name not in WHOLE


def _construct(constructor: type[Optimizer], name: str, params: Any, arguments: dict[str, Any]) -> Optimizer:
    try:
        return eager(constructor)(params, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{name} refuses its options: {error}") from error


def _tried(constructor: type[Optimizer], name: str, arguments: dict[str, Any]) -> Optimizer:
    """Return an optimizer of a small parameter, to see what it takes."""
    return _construct(constructor, name, [nn.Parameter(torch.zeros(2, 2))], arguments)


def _splits_hidden(constructor: Any) -> bool:
    """Return whether an optimizer treats hidden matrices apart: it then has a class attribute of this name."""
    return bool(getattr(constructor, "splits_hidden", False))


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
