"""Proxies of covariance: how different a model makes its inputs."""

import numpy as np
import torch
from torch import Tensor, nn

from raytrain.errors import TrainingError
from raytrain.models.blocks import repeated_blocks
from search.proxies.minibatch import Minibatch, record_output, replace_inputs, working_copy
from search.surrogate.encoding import FloatArray

EIGENVALUE_FLOOR = 1e-5
"""Added to eigenvalues, as Mellor et al. do."""


def spectrum_score(rows: FloatArray) -> float:
    """Return -sum of ln(v + k) + 1 / (v + k) over the eigenvalues v of the correlation matrix; k = 1e-5.

    It is highest, with -n, for n rows without correlations. A row of one value has none.

    Args:
        rows: shape (n, values).

    Source: Mellor et al. 2020, Neural Architecture Search without Training (its first version).

    >>> round(spectrum_score(np.array([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])), 3)
    -2.0
    """
    centred = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    units = np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)
    correlations = units @ units.T
    np.fill_diagonal(correlations, 1.0)
    values = np.maximum(np.linalg.eigvalsh(correlations), 0.0) + EIGENVALUE_FLOOR
    return -float(np.sum(np.log(values) + 1 / values))


def hidden_covariance(module: nn.Module, batch: Minibatch) -> float:
    """Score of the correlations between the hidden units of the first layer, over examples and positions.

    The layer is the first recurrent one, or without any the first of the repeated blocks.

    Source: Serianni and Kalita 2023, Training-free NAS for RNNs and Transformers, as in their code.

    Raises:
        TrainingError: the model has no such layer.
    """
    with working_copy(module) as working:
        recurrent = [layer for layer in working.modules() if isinstance(layer, nn.RNNBase)]
        layers = recurrent or repeated_blocks(working)
        if not layers:
            raise TrainingError(
                f"hidden-covariance: expected recurrent layers or repeated blocks, as in an nn.ModuleList; "
                f"{type(module).__name__} has neither"
            )
        states = record_output(layers[0])
        batch.loss(working)
    return spectrum_score(_array(states[0]).reshape(-1, states[0].shape[-1]).T)


def jacobian_covariance(module: nn.Module, batch: Minibatch) -> float:
    """Score of the correlations between the examples' gradients: of the sum of the outputs by the embeddings.

    Source: Mellor et al. 2020; for text as in Serianni and Kalita 2023.
    """
    leaves: list[Tensor] = []

    def leaf(embedding: Tensor) -> Tensor:
        leaves.append(embedding.detach().requires_grad_())
        return leaves[-1]

    with working_copy(module) as working:
        replace_inputs(working, leaf)
        sums = record_output(working)
        batch.loss(working)
        [gradient] = torch.autograd.grad(sums[0].sum(), leaves[:1])
    return spectrum_score(_array(gradient).reshape(len(gradient), -1))


def _array(tensor: Tensor) -> FloatArray:
    found: FloatArray = tensor.detach().double().cpu().numpy()
    return found
