"""Proxies of weights and their gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from raytrain.errors import TrainingError
from search.proxies.minibatch import Minibatch, output_tensor, replace_inputs, working_copy

ATTENTION = ("attn", "attention")
"""What the name of an attention layer contains."""


def parameter_count(module: nn.Module, batch: Minibatch) -> float:  # noqa: ARG001 - as the other proxies
    """Number of parameters, which every other proxy has to beat."""
    return float(sum(parameter.numel() for parameter in module.parameters()))


def gradient_norm(module: nn.Module, batch: Minibatch) -> float:
    """Sum of ||g||_2 over the gradients g of all parameters.

    Source: Abdelfattah et al. 2021, Zero-Cost Proxies for Lightweight NAS (grad_norm).
    """
    return sum(float(gradient.norm()) for _, _, gradient in _gradients(module, batch))


def snip(module: nn.Module, batch: Minibatch) -> float:
    """Sum of |w g| over all parameters w and their gradients g.

    Source: Lee et al. 2019, SNIP, summed over a model as Abdelfattah et al. 2021 do.
    """
    return sum(_saliency(weight, gradient) for _, weight, gradient in _gradients(module, batch))


def synaptic_saliency(module: nn.Module, batch: Minibatch) -> float:
    """Sum of |W g| over the matrices W outside attention and embeddings.

    Source: Zhou et al. 2022, Training-free Transformer Architecture Search. Others differentiate the sum of the last
    hidden state, which is constant behind a layer norm; here it is the loss of the minibatch.
    """
    found = _matrices(module, batch, attention=False)
    return sum(_saliency(weight, gradient) for weight, gradient in found)


def synaptic_diversity(module: nn.Module, batch: Minibatch) -> float:
    """Sum of ||W||_* ||g||_* over the matrices W of attention layers; ||.||_* is the nuclear norm.

    Source: Zhou et al. 2022, with the loss of the minibatch.

    Raises:
        TrainingError: the model has no attention.
    """
    found = list(_matrices(module, batch, attention=True))
    if not found:
        raise TrainingError(
            f"synaptic-diversity: expected layers whose names contain {' or '.join(ATTENTION)}; "
            f"{type(module).__name__} has none; use synaptic-saliency"
        )
    return sum(_nuclear_norm(weight) * _nuclear_norm(gradient) for weight, gradient in found)


def synflow(module: nn.Module, batch: Minibatch) -> float:
    """Sum of w dR/dw over all parameters; R is the sum of the outputs with |w| for w and ones for the embeddings.

    Layers of normalisation pass their inputs on, which would otherwise undo the scale of what comes before.

    Source: Tanaka et al. 2020, Pruning Neural Networks without Any Data; normalisation as in Abdelfattah et al.
    2021.
    """
    with working_copy(module) as working:
        working.double()
        for parameter in working.parameters():
            parameter.detach().abs_()
        for layer in working.modules():
            if "Norm" in type(layer).__name__:
                layer.register_forward_hook(lambda _layer, inputs, _output: inputs[0])
        replace_inputs(working, torch.ones_like)
        flows: list[Tensor] = []
        working.register_forward_hook(lambda _module, _inputs, output: flows.append(output_tensor(output).sum()))
        batch.as_for(next(working.parameters())).loss(working)
        flows[0].backward()
        return sum(
            _saliency(weight.detach(), weight.grad) for weight in working.parameters() if weight.grad is not None
        )


def _gradients(module: nn.Module, batch: Minibatch) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, value and gradient of each parameter that the loss depends on."""
    with working_copy(module) as working:
        for parameter in working.parameters():
            parameter.requires_grad_()
        batch.loss(working).backward()
        for name, parameter in working.named_parameters():
            if parameter.grad is not None:
                yield name, parameter.detach(), parameter.grad


def _matrices(module: nn.Module, batch: Minibatch, *, attention: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield value and gradient of each matrix in attention layers, or of each other one outside embeddings."""
    layers = module.named_modules()
    embeddings = {f"{name}.weight" for name, layer in layers if isinstance(layer, nn.Embedding)}
    for name, weight, gradient in _gradients(module, batch):
        in_attention = any(word in name.lower() for word in ATTENTION)
        if weight.ndim == 2 and name not in embeddings and in_attention is attention:
            yield weight, gradient


def _saliency(weight: Tensor, gradient: Tensor) -> float:
    return float((weight * gradient).abs().sum())


def _nuclear_norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, "nuc"))
