"""The repeated blocks of a model: what is frozen, recomputed or sharded as one."""

from collections.abc import Iterator

from torch import nn


def blocks(module: nn.Module) -> dict[str, nn.Module]:
    """Return name -> block, for each block of the model: what the outermost lists of modules hold.

    A transformer's layers are one such list; a model without any has no blocks.
    """
    return dict(_blocks(module, ""))


def _blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}.{place}", block) for place, block in child.named_children())
        else:
            yield from _blocks(child, f"{path}.")
