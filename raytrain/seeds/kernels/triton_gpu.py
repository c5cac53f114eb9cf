"""The GPU kernel, in Triton; without Triton or GPU only its constructor fails, and says why."""

import importlib
import os
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from raytrain.errors import RaytrainError
from raytrain.seeds.kernels.kernel import ScaledDirection
from raytrain.seeds.prng import LOW, PER_BLOCK, Distribution

# Per program of `accumulate`: one block per thread. Signs use nearly all registers, so a program is one warp.
BLOCKS: dict[Distribution, int] = {"rademacher": 32, "gaussian": 128}
TOGETHER: dict[Distribution, int] = {"rademacher": 4, "gaussian": 8}  # models that share the noise of a program
PROGRAMS = 1024  # fewer programs of `accumulate` would leave a large GPU idle
AXPY_WORDS = 64  # per program of `axpy`, of signs
AXPY_BLOCKS = 256  # per program of `axpy`, of normal variates
UNFUSED = {"enable_fp_fusion": False}  # a fused multiply-add would round once where prng.py rounds twice


class NoGPUError(RaytrainError):
    """Triton or the GPU is missing."""


class TritonKernel:
    """Programs on one GPU; each generates noise once for four (signs) or eight (normal variates) models.

    With Triton's interpreter (TRITON_INTERPRET=1) it takes CPU tensors.

    Raises:
        NoGPUError: it does not run here; the message says why.
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
        """Accumulate into `out`; see `Kernel.accumulate`."""
        (models, size), count = out.shape, len(seeds)
        if not (models and size and count):
            return
        unit, blocks = PER_BLOCK[distribution], BLOCKS[distribution]
        together = min(TOGETHER[distribution], 1 << (models - 1).bit_length())
        tiles = _parts(_parts(offset + size, unit) - offset // unit, blocks)
        layers = _parts(models, together)
        own = {"blocks": blocks, "models": together, "num_warps": blocks // 32}
        if distribution == "rademacher":
            own["words"] = 4 // together  # per block: a thread's registers hold no more sums
            own["chunk"] = self._kernels.CHUNK
            layers *= together
        # A small parameter is parallelised over seeds too; the partial sums are added at the end.
        piece = _parts(_parts(count, max(1, PROGRAMS // (tiles * layers))), self._kernels.CHUNK) * self._kernels.CHUNK
        pieces = _parts(count, piece)
        found = out.new_zeros(pieces, models, size) if pieces > 1 else out[None]
        add = self._kernels.add_signs if distribution == "rademacher" else self._kernels.add_normals
        arguments = (*_halves(parameter_id), offset, size, models, count, piece)
        with torch.cuda.device_of(out):
            add[tiles, pieces, layers](
                seeds.contiguous(), weights.contiguous(), found, *found.stride(), *arguments, **own, **UNFUSED
            )
        if pieces > 1:
            out += found.sum(0)

    def axpy(self, direction: ScaledDirection, base: Tensor, out: Tensor, rows: Tensor | None = None) -> None:
        """Write to `out`; see `Kernel.axpy`."""
        distribution, seed, scale, parameter_id, offset = direction
        width = base.numel() if rows is None else base[0].numel()
        count = 1 if rows is None else len(rows)
        if not (width and count):
            return
        bits = int(np.float32(scale).view(np.int32))  # Triton would flush a subnormal float argument
        if distribution == "rademacher":
            program, unit, own = self._kernels.axpy_signs, 32, {"words": AXPY_WORDS}
            tiles = _parts(width + unit - 1, unit * AXPY_WORDS)  # a row may start inside a word
        else:
            program, unit, own = self._kernels.axpy_normals, 4, {"blocks": AXPY_BLOCKS}
            tiles = _parts(width + unit - 1, unit * AXPY_BLOCKS)
        arguments = (width, tiles, *_halves(parameter_id), offset, *_halves(seed), bits)
        with torch.cuda.device_of(out):
            program[(tiles * count,)](base, out, rows, *arguments, **own, **UNFUSED)


def _parts(whole: int, size: int) -> int:
    """Return whole / size, rounded up."""
    return -(-whole // size)


def _halves(number: int) -> tuple[int, int]:
    """Return the low and the high 32 bits as signed integers, one argument type for every value."""
    low, high = np.array([number & LOW, number >> 32 & LOW], np.uint32).view(np.int32).tolist()
    return low, high
