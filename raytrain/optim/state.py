"""The state of an optimizer by the names of the parameters, as checkpoints have it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from raytrain.optim.options import OptimizerOptions


def state_by_name(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Return an optimizer's state and groups with names in place of parameters."""
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
    """Load what `state_by_name` returned.

    Hyperparameters keep the recipe's values, so a run can be resumed with others and in other groups. Other entries of
    a group (an estimated distance, a count) come from the saved group of its first parameter.
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
