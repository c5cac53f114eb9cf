"""What a proxy is given: a model and a minibatch, and how it looks into the model without changing it."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raytrain.tasks.task import Batch
from raytrain.tensors import to_device


@dataclass(frozen=True, slots=True)
class Minibatch:
    """Examples and their loss.

    Attributes:
        examples: as `Task.collate` returns.
        losses: (model, examples) -> loss of each example or token, as `Task.losses`.

    >>> batch = Minibatch(torch.ones(2, 3), lambda module, inputs: module(inputs).sum(dim=1))
    >>> float(batch.loss(nn.Identity()))
    3.0
    """

    examples: Batch
    losses: Callable[[nn.Module, Batch], Tensor]

    def loss(self, module: nn.Module) -> Tensor:
        """Return the mean of the losses, shape ()."""
        return self.losses(module, self.examples).mean()

    def as_for(self, weight: Tensor) -> "Minibatch":
        """Return the minibatch on the device of a weight, with floating-point inputs of its type."""
        return Minibatch(to_device(self.examples, weight.device, weight.dtype), self.losses)


Proxy = Callable[[nn.Module, Minibatch], float]
"""(model, minibatch) -> score; a model that is expected to end with a lower loss has a higher one."""


@contextmanager
def working_copy(module: nn.Module) -> Iterator[nn.Module]:
    """Give a copy of a model in evaluation mode and without gradients, in a `with` block that draws from seed 0.

    The model itself and the random numbers of whoever calls stay as they are.
    """
    no_cudnn = torch.backends.cudnn.flags(enabled=False)  # which refuses a backward pass of RNNs in evaluation mode
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), no_cudnn:
        torch.manual_seed(0)
        copied = copy.deepcopy(module).eval()
        copied.zero_grad()
        yield copied


def output_tensor(output: Any) -> Tensor:
    """Return the tensor that a layer or a model returns: of a Hugging Face model the logits, of several the first."""
    output = getattr(output, "logits", output)
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def record_output(layer: nn.Module) -> list[Tensor]:
    """Return a list to which each later call of the layer adds its output."""
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output_tensor(output)))
    return outputs


def replace_inputs(module: nn.Module, replaced: Callable[[Tensor], Tensor]) -> None:
    """Replace what a model computes with: the output of its first embedding, or without one its floating-point inputs.

    Args:
        module: the model, which is changed.
        replaced: embedding -> what takes its place, of the same shape.
    """
    embedding = next((layer for layer in module.modules() if isinstance(layer, nn.Embedding)), None)
    if embedding is not None:
        embedding.register_forward_hook(lambda _layer, _inputs, output: replaced(output))
        return

    def change(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = {name: _if_real(value, replaced) for name, value in kwargs.items()}
        return tuple(_if_real(value, replaced) for value in args), changed

    module.register_forward_pre_hook(change, with_kwargs=True)


def _if_real(value: Any, replaced: Callable[[Tensor], Tensor]) -> Any:
    return replaced(value) if isinstance(value, Tensor) and value.is_floating_point() else value
