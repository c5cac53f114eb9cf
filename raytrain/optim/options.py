"""Optimizers by name, and the options of each. They load without torch: a recipe is read by them.

Beside these they are the arguments of its constructor: see `raytrain.optim.arguments`.
"""

from collections.abc import Mapping, Set
from functools import cache
from typing import Any, ClassVar, Self

from pydantic import Field, ValidationError, create_model, model_validator

from raytrain.recipe import Options, Section, explain_errors

OPTIMIZERS: dict[str, str] = {
    "sgd": "torch.optim:SGD Stochastic gradient descent, with momentum or Nesterov's (Sutskever et al. 2013).",
    "adam": "torch.optim:Adam Steps scaled by running moments of the gradient (Kingma and Ba 2015).",
    "adamw": "torch.optim:AdamW Adam with decoupled weight decay (Loshchilov and Hutter 2019).",
    "nadam": "torch.optim:NAdam Adam with Nesterov momentum (Dozat 2016).",
    "nadamw": "raytrain.optim.nadamw:NAdamW",
    "radam": "torch.optim:RAdam Adam that waits until the variance of its scale is known (Liu et al. 2020).",
    "adagrad": "torch.optim:Adagrad Steps scaled by the sum of all squared gradients (Duchi et al. 2011).",
    "rmsprop": "torch.optim:RMSprop Steps scaled by a running mean of squared gradients (Tieleman and Hinton 2012).",
    "adabelief": "pytorch_optimizer:AdaBelief Adam scaled by how far gradients are from expected (Zhuang et al. 2020).",
    "adan": "pytorch_optimizer:Adan Adam with Nesterov momentum of gradient differences (Xie et al. 2022).",
    "lamb": "raytrain.optim.lamb:Lamb",
    "lion": "pytorch_optimizer:Lion The sign of an interpolated momentum (Chen et al. 2023).",
    "prodigy": "pytorch_optimizer:Prodigy Adam that estimates its learning rate (Mishchenko and Defazio 2023).",
    "schedulefree": "pytorch_optimizer:ScheduleFreeAdamW AdamW with an average of the weights (Defazio et al. 2024).",
    "sgdsai": "raytrain.optim.sgd_sai:SGDSaI",
    "muon": "raytrain.optim.muon:Muon",
    "galore": "raytrain.optim.galore:GaLore",
    "fira": "raytrain.optim.galore:Fira",
}

ZEROTH_ORDER: dict[str, str] = {
    "zo-sgd": "raytrain.zeroth.optimizers:ZOSGD",
    "zo-sgd-sign": "raytrain.zeroth.optimizers:ZOSign",
    "zo-sgd-conservative": "raytrain.zeroth.optimizers:ZOConservative",
    "zo-sgd-momentum": "raytrain.zeroth.optimizers:ZOMomentum",
    "zo-adam": "raytrain.zeroth.optimizers:ZOAdam",
    "zo-hybrid": "raytrain.zeroth.optimizers:ZOHybrid",
    "forward-gradient": "raytrain.zeroth.optimizers:ForwardGradient",
}
"""Optimizers that take projected gradients, and no gradients."""

ALL_OPTIMIZERS = OPTIMIZERS | ZEROTH_ORDER

NOT_ELEMENTWISE = frozenset({"lamb", "prodigy", "sgdsai", "muon", "galore", "fira"})
"""Optimizers that look at a parameter as a whole: on shards of it they take other steps. All others go by elements."""

SINGLE_LR = frozenset({"prodigy"})
"""Optimizers that find one learning rate for all parameters, which no group can have apart."""


class GroupRule(Section):
    """A rule for some parameters; fields beyond these are options of the optimizer for them.

    Attributes:
        match: which parameters, as a pattern of their names ("*.embed*", "layers.[01].*"); a parameter follows the
            first rule that fits it. The pattern stands for the whole name, upper and lower case differ.
        lr_scale: factor of the learning rate.
        decay_1d: weight decay on parameters of fewer than two dimensions (biases, norms); default: as for all others.
    """

    match: str
    lr_scale: float = Field(1.0, ge=0)
    decay_1d: bool | None = None

    def options(self) -> dict[str, Any]:
        """Return the options of the optimizer that the rule sets."""
        return self.model_dump(exclude={*GroupRule.model_fields, "hidden"}, exclude_none=True)


class OptimizerOptions(Options):
    """What every optimizer takes beside the arguments of its constructor.

    Attributes:
        decay_1d: weight decay on biases, norms and other parameters of fewer than two dimensions too.
        gradient_noise: variance of the Gaussian noise that is added to the gradient, after clipping; 0: none.
        gradient_noise_decay: after t steps that variance is divided by (1 + t) to this power.
        groups: rules for some of the parameters; see `GroupRule`.
    """

    shared: ClassVar[frozenset[str]] = frozenset()
    """Options that cannot differ between groups."""
    splits_hidden: ClassVar[bool] = False
    """Whether it treats hidden matrices apart."""
    fuses: ClassVar[bool] = False
    """Whether it has one kernel for a whole step, which is used unless optimizer.fused says otherwise."""
    averages: ClassVar[bool] = False
    """Whether it averages the weights by itself."""
    zeroth: ClassVar[bool] = False
    """Whether it takes projected gradients, and no gradients."""
    exact: ClassVar[bool] = False
    """Whether these are directional derivatives, and not finite differences."""
    selects: ClassVar[bool] = False
    """Whether it decides by a loss which way to go."""
    hybrid: ClassVar[bool] = False
    """Whether it takes projected gradients for some of the parameters, and gradients for others."""
    decay_1d: bool = False
    gradient_noise: float = Field(0.0, ge=0)
    gradient_noise_decay: float = Field(0.55, ge=0)
    groups: tuple[GroupRule, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """Return what the constructor takes."""
        arguments = self.model_dump(exclude=set(OptimizerOptions.model_fields))
        if self.fuses and arguments["fused"] is None and not arguments["foreach"]:
            arguments["fused"] = True
        return arguments

    @model_validator(mode="after")
    def _rules_fit(self) -> Self:
        for place, rule in enumerate(self.groups):
            where, own = f"groups.{place} (match = {rule.match!r})", rule.options()
            if self.name in SINGLE_LR and (rule.lr_scale != 1 or "lr" in own):
                raise ValueError(f"{where}: {self.name} finds one learning rate for all parameters; leave lr_scale out")
            if fixed := sorted(own.keys() & self._shared_options()):
                raise ValueError(
                    f"{where}: {self.name} has one {fixed[0]} for all parameters; set optimizer.{fixed[0]}"
                )
            self._check_rule(where, own)
        return self

    def _shared_options(self) -> Set[str]:
        """Return the options that cannot differ between groups."""
        return self.shared

    def _check_rule(self, where: str, own: Mapping[str, Any]) -> None:
        """Check that the options of a rule fit each other and those that it leaves."""
        try:
            type(self).model_validate({**self.model_dump(exclude={"groups"}), **own})
        except ValidationError as error:
            raise ValueError(f"{where}: {explain_errors(error)}") from None


@cache  # equal recipes need equal classes
def with_rules(options: type[OptimizerOptions]) -> type[OptimizerOptions]:
    """Return options whose `groups` are rules with any option of the optimizer."""
    own = {name: field for name, field in options.model_fields.items() if name not in OptimizerOptions.model_fields}
    fields: dict[str, Any] = {name: (field.rebuild_annotation() | None, None) for name, field in own.items()}
    if options.splits_hidden:
        fields["hidden"] = (bool | None, None)
    rule: Any = create_model(f"{options.__name__}Rule", __base__=GroupRule, **fields)
    return create_model(options.__name__, __base__=options, groups=(tuple[rule, ...], ()))


def is_elementwise(name: str) -> bool:
    """Return whether an optimizer updates elements independently, and so shards like whole tensors."""
    return name in OPTIMIZERS and name not in NOT_ELEMENTWISE
