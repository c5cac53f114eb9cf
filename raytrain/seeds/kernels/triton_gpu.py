"""The GPU kernel, in Triton. Without Triton or a GPU this can be imported still, and says why it cannot be had."""

import importlib
import os
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from raytrain.errors import RaytrainError
from raytrain.seeds.kernels.kernel import ScaledDirection
from raytrain.seeds.prng import LOW, PER_BLOCK, Distribution

# Of a program that adds: each thread has one block of it. Signs take nearly all registers, so a program is one warp.
BLOCKS: dict[Distribution, int] = {"rademacher": 32, "gaussian": 128}
TOGETHER: dict[Distribution, int] = {"rademacher": 4, "gaussian": 8}  # models that share what a program draws
PROGRAMS = 1024  # fewer that add would leave a large GPU idle
MOVED_WORDS = 64  # of a program that moves, in signs
MOVED_BLOCKS = 256  # of a program that moves, in normal numbers
UNFUSED = {"enable_fp_fusion": False}  # a fused multiply-add would round once where the stream says twice


class NoGPUError(RaytrainError):
    """Triton or the GPU is missing."""


class TritonKernel:
    """Programs on one GPU. One draws the numbers of its blocks once for four models (signs) or eight (normal numbers).

    Where Triton's interpreter is on (TRITON_INTERPRET=1), it takes tensors of the CPU.

    Raises:
        NoGPUError: this machine cannot have it; the message says why.
    """

    name = "triton"
    device = "cuda"
    dtypes = frozenset({torch.float32, torch.bfloat16, torch.float16})

    def __init__(self) -> None:
        if find_spec("triton") is None:
            raise NoGPUError("Triton is not installed")
        if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):  # else Triton is not even imported
            raise NoGPUError("torch finds no GPU")
        try:
            self._kernels = importlib.import_module("raytrain.seeds.kernels.triton_programs")
        except ImportError as error:
            raise NoGPUError(f"Triton cannot be imported: {error}") from error
        if not torch.cuda.is_available() and not self._kernels.INTERPRETED:
            raise NoGPUError("torch finds no GPU, and Triton's interpreter is off")

    def accumulate(
        self, distribution: Distribution, seeds: Tensor, weights: Tensor, parameter_id: int, offset: int, out: Tensor
    ) -> None:
        """Add to `out`; see `Kernel.sums`."""
        (models, size), count = out.shape, len(seeds)
        if not (models and size and count):
            return
        unit, blocks = PER_BLOCK[distribution], BLOCKS[distribution]
        together = min(TOGETHER[distribution], 1 << (models - 1).bit_length())
        tiles = _parts(_parts(offset + size, unit) - offset // unit, blocks)
        layers = _parts(models, together)
        own = {"blocks": blocks, "models": together, "num_warps": blocks // 32}
        if distribution == "rademacher":
            own["words"] = 4 // together  # of a block: a thread has registers for the sums of so many
            own["chunk"] = self._kernels.CHUNK
            layers *= together
        # A small parameter is shared out by seeds too, and what the pieces find is added up after.
        piece = _parts(_parts(count, max(1, PROGRAMS // (tiles * layers))), self._kernels.CHUNK) * self._kernels.CHUNK
        pieces = _parts(count, piece)
        found = out.new_zeros(pieces, models, size) if pieces > 1 else out[None]
        add = self._kernels.add_signs if distribution == "rademacher" else self._kernels.add_normals
        place = (*_halves(parameter_id), offset, size, models, count, piece)
        with torch.cuda.device_of(out):
            add[tiles, pieces, layers](
                seeds.contiguous(), weights.contiguous(), found, *found.stride(), *place, **own, **UNFUSED
            )
        if pieces > 1:
            out += found.sum(0)

    def axpy(self, direction: ScaledDirection, base: Tensor, out: Tensor, rows: Tensor | None = None) -> None:
        """Write to `out`; see `Kernel.move`."""
        mode, seed, scale, parameter, start = direction
        width = base.numel() if rows is None else base[0].numel()
        count = 1 if rows is None else len(rows)
        if not (width and count):
            return
        bits = int(np.float32(scale).view(np.int32))  # Triton would round a tiny number on the way
        if mode == "rademacher":
            move, unit, own = self._kernels.move_signs, 32, {"words": MOVED_WORDS}
            tiles = _parts(width + unit - 1, unit * MOVED_WORDS)  # wherever in a word a row starts
        else:
            move, unit, own = self._kernels.move_normals, 4, {"blocks": MOVED_BLOCKS}
            tiles = _parts(width + unit - 1, unit * MOVED_BLOCKS)
        place = (width, tiles, *_halves(parameter), start, *_halves(seed), bits)
        with torch.cuda.device_of(out):
            move[(tiles * count,)](base, out, rows, *place, **own, **UNFUSED)


def _parts(whole: int, size: int) -> int:
    """Return how many parts of a size hold a whole."""
    return -(-whole // size)


def _halves(number: int) -> tuple[int, int]:
    """Return the low and the high 32 bits as numbers with sign: they have one type then, whatever they are."""
    low, high = np.array([number & LOW, number >> 32 & LOW], np.uint32).view(np.int32).tolist()
    return low, high
