"""The parameters that a federated run moves: w0, the model of a round, and a working copy."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from federated.global_model import GlobalModel
from federated.protocols.protocol import Protocol
from raytrain.seeds.directions import Directions
from raytrain.seeds.seed_model import SeedModel
from raytrain.seeds.updates import materialise
from raytrain.tensors import tensor_digest
from raytrain.zeroth.perturbed import PerturbedModel


class WorkingModel:
    """A module whose parameters are set to the model of a round, again for each client.

    Args:
        module: with w0; from now on its parameters are the working copy.
        directions: of its parameters that directions move.
        initial: w0 by names, as of a file that is mapped; None: a copy of the module's.
        keep_round: whether the round's model is kept beside the working copy, so that a client begins with a copy of
            it. Without, it is made anew for each client: slower, with one model less in memory.
        options: of how it is probed.

    Attributes:
        base: the digest of all the weights that the module begins with, of what directions are, and of the options.
    """

    def __init__(
        self,
        module: nn.Module,
        directions: Directions,
        initial: Mapping[str, Tensor] | None = None,
        *,
        keep_round: bool = True,
        options: str = "",
    ) -> None:
        self.module = module
        self.directions = directions
        self.perturbed = PerturbedModel(module, directions)
        device = directions.slices[0].tensor.device
        if initial is None:
            w0 = {part.name: part.tensor.clone() for part in directions.slices}
        else:
            w0 = {name: tensor.to(device) for name, tensor in initial.items()}  # on a CPU they stay in their file
        self._initial = directions.with_tensors(w0, read_only=True)
        self._space_digest = self._initial.digest()
        about = self._space_digest + _digest_beside(module, directions) + options
        self.base = hashlib.sha256(about.encode()).hexdigest()
        self._working = [part.tensor for part in directions.slices]
        self._round = [tensor.clone() for tensor in self._working] if keep_round else None
        self._coefficients = torch.zeros(0, dtype=torch.float64)
        self._seeds: list[int] = []
        self._digest = b""

    def set_to(self, model: GlobalModel, protocol: Protocol) -> None:
        """Set the working copy to the model of a round: w0 + sum of coefficients * directions, rounded once."""
        if model.digest != self._digest:
            seeds, coefficients = protocol.seeds_and_coefficients(model)
            self._seeds, self._coefficients, self._digest = seeds.tolist(), torch.from_numpy(coefficients), model.digest
            if self._round is not None:
                materialise(self._initial, self._coefficients, self._seeds, self._round)
        if self._round is None:
            materialise(self._initial, self._coefficients, self._seeds, self._working)
        else:
            torch._foreach_copy_(self._working, self._round)

    def set_to_seeds(self, model: SeedModel) -> nn.Module:
        """Set the working copy to what `seed_model` returned, and return the module.

        Raises:
            RecipeError: it is a model of other first weights.
        """
        model.weights(self._initial, self._working, digest=self._space_digest)
        return self.module

    def seed_model(self, model: GlobalModel, protocol: Protocol) -> SeedModel:
        """Return a model for others to read, from whom only w0 is asked."""
        seeds, coefficients = protocol.seeds_and_coefficients(model)
        numbers = torch.tensor(coefficients.tolist(), dtype=torch.float64)  # NumPy's, if empty, cannot be seen as bytes
        return SeedModel(
            self._space_digest, tuple(seeds.tolist()), numbers, self.directions.distribution, model.version
        )


def _digest_beside(module: nn.Module, space: Directions) -> str:
    """Return the digest of what directions leave alone: frozen parameters, as of an adapter's base, and buffers."""
    moved = {part.tensor.data_ptr() for part in space.slices}
    return tensor_digest((name, value) for name, value in module.state_dict().items() if value.data_ptr() not in moved)
