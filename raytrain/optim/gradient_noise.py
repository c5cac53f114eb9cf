"""Gaussian noise in the gradients."""

import hashlib
import math

import torch
from torch import nn


def add_gradient_noise(module: nn.Module, seed: int, step: int, variance: float, decay: float) -> None:
    """Add Gaussian noise of variance `variance` / (1 + step)^decay to the gradients (Neelakantan et al. 2015).

    What is drawn follows from the seed, the step and the parameter's name alone. So all replicas draw the same, however
    many they are, and a resumed run draws what the uninterrupted one would.

    Args:
        module: whose gradients.
        seed: of the run.
        step: counted from 0.
        variance: eta of the paper, which tries 0.01, 0.3 and 1.
        decay: gamma of the paper, 0.55 there.
    """
    deviation = math.sqrt(variance / (1 + step) ** decay)
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            drawn = hashlib.sha256(f"{seed} {step} {name}".encode()).digest()
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(drawn[:8]) >> 1)
            noise = torch.empty_like(parameter.grad).normal_(generator=generator)
            parameter.grad.add_(noise, alpha=deviation)
