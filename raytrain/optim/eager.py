"""Optimizers that leave torch's compiler alone: importing it takes as long as importing torch."""

import inspect
from collections.abc import Callable
from types import new_class
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


class _Eager(Optimizer):
    """The methods of `Optimizer` without the wrappers that keep torch's compiler out, and import it for that."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


def without_compiler(constructor: type[OptimizerT]) -> type[OptimizerT]:
    """Return an optimizer class that takes the same steps and never imports torch's compiler.

    Blocks of a model can be compiled all the same: an optimizer steps outside of them.
    """
    step = _plain_step(constructor)
    own = {"__module__": constructor.__module__, **({} if step is None else {"step": _with_its_mode(step)})}
    # `_Eager` comes right before `Optimizer`, so that a method that the class overrides finds it through `super()`.
    return new_class(constructor.__name__, (constructor, _Eager), exec_body=lambda body: body.update(own))


def _plain_step(constructor: type[Optimizer]) -> Callable[..., Any] | None:
    """Return the step of one of torch's optimizers inside `_use_grad`, which imports the compiler; None for others."""
    step: Any = constructor.step
    while getattr(step, "__globals__", {}).get("__name__") == Optimizer.__module__ and hasattr(step, "__wrapped__"):
        inner: Callable[..., Any] = step.__wrapped__
        if step.__code__.co_name == "_use_grad":
            return inner
        step = inner  # `profile_hook_step`, which every class gets anew
    return None


def _with_its_mode(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step that records gradients if the optimizer is differentiable, as `_use_grad` has it."""

    def stepped(self: Optimizer, closure: Callable[[], float] | None = None) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, closure)

    return stepped
