"""Repeated blocks of a model: detection, activation checkpointing and compilation."""

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raytrain.errors import RecipeError

CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a model, in order and without duplicates; none contains another.

    A block is an entry with parameters of an nn.ModuleList, or of an nn.Sequential of two or more entries of one class.
    Entries that are lists themselves, which are never called, are replaced by their own entries.

    >>> len(repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))
    2
    """
    return list(dict.fromkeys(_blocks(module)))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    entries = [child for child in module.children() if any(True for _ in child.parameters())]
    alike = isinstance(module, nn.Sequential) and len(set(map(type, module.children()))) == 1
    repeated = isinstance(module, CONTAINERS) or (alike and len(entries) > 1)
    for entry in entries:
        if repeated and not isinstance(entry, CONTAINERS):
            yield entry
        else:
            yield from _blocks(entry)


def checkpoint_activations(module: nn.Module) -> None:
    """Recompute the activations of each block in the backward pass instead of storing them.

    Gradients are equal to the bit, dropout included; statistics of a BatchNorm are updated once. Names of parameters do
    not change.

    Raises:
        RecipeError: the model has no repeated blocks.
    """
    found = repeated_blocks(module)
    if not found:
        raise RecipeError(
            f"activation_checkpointing: {type(module).__name__} has no repeated blocks, as an nn.ModuleList of layers "
            "is, and recomputing a whole model at once saves nothing; set activation_checkpointing=false"
        )
    for block in found:
        _replace_forward(block, partial(_recomputed, block, block.forward))


def compile_blocks(module: nn.Module, backend: str, device: torch.device) -> None:
    """Compile each block, or the whole model without blocks; names of parameters do not change.

    Args:
        module: the model.
        backend: of torch.compile.
        device: that the model will run on.

    Raises:
        RecipeError: the backend needs a compiler that is missing.
    """
    if backend == "inductor" and device.type == "cpu":
        _check_compiler()
    for block in repeated_blocks(module) or [module]:
        _replace_forward(block, torch.compile(block.forward, backend=backend))


def _replace_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace the forward method of a block by one with the same metadata; hooks still run."""
    vars(block)["forward"] = update_wrapper(forward, block.forward)


def _recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _restored(list(block.buffers()))

    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, context_fn=contexts)


@contextmanager
def _restored(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Restore buffers at the end of the `with` block, so that recomputation does not update them again."""
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, kept in zip(buffers, before, strict=True):
            buffer.data.copy_(kept)  # `data`, without a new version for autograd


def _check_compiler() -> None:
    """Check that a C++ compiler and Python's headers are installed, as 'inductor' needs on CPUs.

    Raises:
        RecipeError: one is missing.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415 - slow to import
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415 - slow to import

    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        missing = "a C++ compiler"
    else:
        missing = "" if header.is_file() else str(header)
    if missing:
        raise RecipeError(
            f"compile: 'inductor' needs {missing} on every machine that trains on CPUs; install g++ and the headers of "
            "Python, or set compile='' or compile='aot_eager', which needs neither and makes nothing faster"
        )
