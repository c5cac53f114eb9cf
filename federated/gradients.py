"""Local steps with gradients: what clients do whose parameters a strategy of Flower's averages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from federated.client import ClientData
from federated.protocols.options import GradientOptions
from federated.sampling import batches
from raytrain.seeds.prng import fold_in
from raytrain.tasks.losses import loss_weights
from raytrain.tensors import to_device
from raytrain.zeroth.objective import make_closure

Arrays = dict[str, NDArray[Any]]
"""What clients of a model send, by name: its trainable parameters, and the running statistics of its norms."""


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What a client's local steps lead to.

    Attributes:
        arrays: its parameters and running statistics.
        examples: that it has.
        loss: mean over its steps, each before it was taken.
    """

    arrays: Arrays
    examples: int
    loss: float


class GradientTrainer:
    """Trains for any number of clients, one after the other; a client leaves nothing behind.

    Args:
        options: of the recipe.
        module: the model; what clients send of it is in `Arrays`, all other buffers stay as they are.
        data: of the clients.
        new_optimizer: returns an optimizer of the module, without a state.
        master: seed of all draws.
        origin: the digest of what clients begin with.

    Attributes:
        origin: the same.
    """

    def __init__(
        self,
        options: GradientOptions,
        module: nn.Module,
        data: ClientData,
        new_optimizer: Callable[[], Optimizer],
        master: int,
        origin: str = "",
    ) -> None:
        self.origin = origin
        self._options, self._module, self._data, self._master = options, module, data, master
        self._new_optimizer = new_optimizer
        self._parameters = trainable_parameters(module)
        self._buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def fit(
        self, client: int, round_number: int, arrays: Mapping[str, NDArray[Any]], *, lr_ratio: float, proximal_mu: float
    ) -> LocalResult:
        """Take a client's local steps from some parameters.

        Args:
            client: its number.
            round_number: counted from 0; examples and dropout follow from it and the client.
            arrays: of the round's model.
            lr_ratio: learning rate of the round over that of the optimizer.
            proximal_mu: weight of the proximal term mu / 2 |w - w_round|^2 (Li et al. 2020, FedProx, eq. 2).
        """
        for name, buffer in self._module.named_buffers():
            buffer.copy_(self._buffers[name])
        load_arrays(self._module, arrays)
        start = [parameter.detach().clone() for parameter in self._parameters.values()] if proximal_mu else []
        optimizer = self._new_optimizer()
        for group in optimizer.param_groups:
            group["lr"] *= lr_ratio
        own, options = self._data.indices(client), self._options
        drawn = own[batches(self._master, round_number, client, len(own), options.local_steps, options.batch)]
        self._module.train()
        losses = [
            self._step(optimizer, indices, (fold_in(self._master, round_number), client, step), proximal_mu, start)
            for step, indices in enumerate(drawn.tolist())
        ]
        if hasattr(optimizer, "eval"):  # one that averages the weights shows the average then
            optimizer.eval()
        return LocalResult(arrays_of(self._module), len(own), float(np.mean(losses)))

    def _step(
        self,
        optimizer: Optimizer,
        indices: list[int],
        place: tuple[int, int, int],
        proximal_mu: float,
        start: list[Tensor],
    ) -> float:
        """Take a step, and return the loss before it, without the proximal term."""
        task, parameter = self._data.task, next(iter(self._parameters.values()))
        examples = [self._data.examples[index] for index in indices]
        batch = to_device(task.collate(examples), parameter.device, parameter.dtype)
        weights = loss_weights(task, batch, len(indices), parameter.device)
        loss = make_closure(task, self._module, [(batch, weights)], place, None, "")()
        distance = [
            (parameter - before).square().sum()
            for parameter, before in zip(self._parameters.values(), start, strict=False)
        ]
        optimizer.zero_grad()
        (loss + proximal_mu / 2 * torch.stack(distance).sum() if distance else loss).backward()
        optimizer.step()
        return float(loss.detach())


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of a module by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return the running means and variances of a module by name, which BatchNorm evaluates with."""
    return {
        f"{name}.{key}".removeprefix("."): buffer
        for name, part in module.named_modules()
        if getattr(part, "track_running_stats", False)
        for key, buffer in part.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }


def arrays_of(module: nn.Module) -> Arrays:
    """Return a copy of what clients of a module send; bfloat16, which NumPy does not have, as float32."""
    return {name: _array(tensor.detach()) for name, tensor in _sent_tensors(module).items()}


@torch.no_grad()
def load_arrays(module: nn.Module, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Set what `arrays_of` returns of a module."""
    for name, tensor in _sent_tensors(module).items():
        tensor.copy_(torch.from_numpy(np.asarray(arrays[name], order="C")))


def _sent_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**trainable_parameters(module), **running_statistics(module)}


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy().copy()
    return array
