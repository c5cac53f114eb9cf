"""Optimizers that never import torch's compiler, which takes as long as importing torch itself."""

import inspect
from collections.abc import Callable
from types import new_class
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


class _Eager(Optimizer):
    """Methods of `Optimizer` without the wrappers that disable torch's compiler, and import it to do so."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


def without_compiler(constructor: type[OptimizerT]) -> type[OptimizerT]:
    """Return a subclass of an optimizer that computes the same steps and never imports torch's compiler.

    The blocks of a model can be compiled nevertheless, as optimizers step outside of them.
    """
    step = _unwrapped_step(constructor)
    own = {"__module__": constructor.__module__, **({} if step is None else {"step": _with_grad_mode(step)})}
    # `_Eager` comes right before `Optimizer`, so that a method that the class overrides finds it through `super()`.
    return new_class(constructor.__name__, (constructor, _Eager), exec_body=lambda body: body.update(own))


def _unwrapped_step(constructor: type[Optimizer]) -> Callable[..., Any] | None:
    """Return the `step` that torch wraps in `_use_grad`, which imports the compiler; None: no such."""
    step: Any = constructor.step
    while getattr(step, "__globals__", {}).get("__name__") == Optimizer.__module__ and hasattr(step, "__wrapped__"):
        inner: Callable[..., Any] = step.__wrapped__
        if step.__code__.co_name == "_use_grad":
            return inner
        step = inner  # `profile_hook_step`, which each class adds again
    return None


def _with_grad_mode(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step that records gradients only if the optimizer is differentiable, as `_use_grad` does."""

    def step_in_mode(self: Optimizer, closure: Callable[[], float] | None = None) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, closure)

    return step_in_mode
