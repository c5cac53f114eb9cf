"""Gaussian gradient noise (Neelakantan et al. 2015)."""

import hashlib
import math

import torch
from torch import nn


def add_gradient_noise(module: nn.Module, seed: int, step: int, variance: float, decay: float) -> None:
    """Add Gaussian noise of variance `variance` / (1 + step)^decay to the gradients in place.

    The noise depends on the seed, the step and the parameter's name only. So all replicas add the same, and a resumed
    run adds that of an uninterrupted one.

    Args:
        module: the model, with gradients.
        seed: of the run.
        step: counted from 0.
        variance: eta of the paper, which tries 0.01, 0.3 and 1.
        decay: gamma of the paper, 0.55 there.

    Source: Neelakantan et al. 2015, equation 1.
    """
    deviation = math.sqrt(variance / (1 + step) ** decay)
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            key = hashlib.sha256(f"{seed} {step} {name}".encode()).digest()
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(key[:8]) >> 1)
            noise = torch.empty_like(parameter.grad).normal_(generator=generator)
            parameter.grad.add_(noise, alpha=deviation)
