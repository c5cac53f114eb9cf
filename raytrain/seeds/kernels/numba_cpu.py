"""The CPU kernel without a C++ compiler: Numba compiles it on first use, for any CPU."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from raytrain.seeds.kernels.kernel import ScaledDirection
from raytrain.seeds.prng import (
    COS,
    KEY_STEPS,
    LOG,
    LOW,
    MULTIPLIERS,
    PER_BLOCK,
    ROOT_HALF_BITS,
    SIN,
    UNITS,
    Distribution,
)

_TILE = 32  # blocks at a time, whose words and sums fit in the L1 cache
_CHUNK = 32  # seeds whose 25-bit weights are summed in 32 bits
_PIECE = 1 << 16  # elements per call of a thread

_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_W0, _W1 = np.uint32(KEY_STEPS[0]), np.uint32(KEY_STEPS[1])
_HALF = np.uint64(32)
_ROOT = np.int32(ROOT_HALF_BITS)
_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (np.float32(value) for value in LOG)
_S0, _S1, _S2 = (np.float32(value) for value in SIN)
_C0, _C1, _C2 = (np.float32(value) for value in COS)
_LN_2 = np.float32(np.log(2))
_RADIANS = np.float32(2 * np.pi / 2**32)
_SCALE = np.float32(2**20)
_ONE, _HALF_ONE, _TWO = np.float32(1), np.float32(0.5), np.float32(2)
_U_UNIT = np.float32(2.0**-24)
_UNIT = np.float32(UNITS["gaussian"])


def _compiled(function: Callable[..., None]) -> Any:
    """Compile a function, and cache the result on disk where that is possible."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the home folder is writable
        return njit(**options)(function)


class NumbaKernel:
    """Loops that LLVM vectorises, on as many threads as torch uses."""

    name = "numba"
    device = "cpu"
    dtypes = frozenset({torch.float32})

    def accumulate(
        self, distribution: Distribution, seeds: Tensor, weights: Tensor, parameter_id: int, offset: int, out: Tensor
    ) -> None:
        """Accumulate into `out`; see `Kernel.accumulate`."""
        size, total = PER_BLOCK[distribution], out.numpy()
        keys, each = seeds.numpy().view(np.uint64), weights.numpy()
        total_weight = each.astype(np.int64).sum(1, keepdims=True) if distribution == "rademacher" else 0
        add = _add_signs if distribution == "rademacher" else _add_normals

        def piece(first: int, last: int) -> None:
            block = first // size
            found = np.zeros((len(each), (-(-last // size) - block) * size), np.int64)
            add(keys, each, parameter_id & LOW, parameter_id >> 32, block, found)
            part = found[:, first - block * size : last - block * size]
            total[:, first - offset : last - offset] += (
                2 * part - total_weight if distribution == "rademacher" else part
            )

        _in_pieces(piece, offset, offset + out.shape[1], _PIECE)

    def axpy(self, direction: ScaledDirection, base: Tensor, out: Tensor, rows: Tensor | None = None) -> None:
        """Write to `out`; see `Kernel.axpy`."""
        distribution, seed, scale, parameter_id, offset = direction
        source, target = base.view(-1).numpy(), out.view(-1).numpy()
        key = (np.uint64(seed), np.float32(scale), parameter_id & LOW, parameter_id >> 32)
        axpy = _axpy_signs if distribution == "rademacher" else _axpy_normals
        if rows is not None:
            width = base[0].numel()
            for to, row in enumerate(rows.tolist()):
                part = source[row * width : (row + 1) * width]
                axpy(*key, offset + row * width, part, target[to * width : (to + 1) * width])
            return
        _in_pieces(
            lambda first, last: axpy(
                *key, first, source[first - offset : last - offset], target[first - offset : last - offset]
            ),
            offset,
            offset + len(source),
            max(_PIECE, -(-len(source) // torch.get_num_threads())),
        )


def _in_pieces(work: Callable[[int, int], None], start: int, stop: int, size: int) -> None:
    """Call work(first, last) for pieces of a range, on as many threads as torch uses."""
    edges = [start, *range((start // size + 1) * size, stop, size), stop]
    pieces = list(zip(edges[:-1], edges[1:], strict=True))
    if len(pieces) < 2 or torch.get_num_threads() == 1:
        for first, last in pieces:
            work(first, last)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(lambda piece: work(*piece), pieces))


@njit(inline="always")
def _round(c0, c1, c2, c3, k0, k1):
    p0, p1 = np.uint64(c0) * _M0, np.uint64(c2) * _M1
    return np.uint32(p1 >> _HALF) ^ c1 ^ k0, np.uint32(p1), np.uint32(p0 >> _HALF) ^ c3 ^ k1, np.uint32(p0)


@njit(inline="always")
def _words(words, seed, low, high, first):
    """Fill words, shape (4, n), with those of blocks from `first` on; unrolled, as LLVM does not."""
    for i in range(words.shape[1]):
        block = np.uint64(first + i)
        c0, c1, c2, c3 = np.uint32(block), np.uint32(block >> _HALF), np.uint32(low), np.uint32(high)
        k0, k1 = np.uint32(seed), np.uint32(seed >> _HALF)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, np.uint32(k0 + _W0), np.uint32(k1 + _W1))
        k0, k1 = np.uint32(k0 + _W0 + _W0), np.uint32(k1 + _W1 + _W1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, np.uint32(k0 + _W0), np.uint32(k1 + _W1))
        k0, k1 = np.uint32(k0 + _W0 + _W0), np.uint32(k1 + _W1 + _W1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, np.uint32(k0 + _W0), np.uint32(k1 + _W1))
        k0, k1 = np.uint32(k0 + _W0 + _W0), np.uint32(k1 + _W1 + _W1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, np.uint32(k0 + _W0), np.uint32(k1 + _W1))
        k0, k1 = np.uint32(k0 + _W0 + _W0), np.uint32(k1 + _W1 + _W1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, np.uint32(k0 + _W0), np.uint32(k1 + _W1))
        words[0, i], words[1, i], words[2, i], words[3, i] = c0, c1, c2, c3


@_compiled
def _add_signs(seeds, weights, low, high, first, out):
    """Add the weights of the seeds whose bit is set to out, shape (models, 128 n)."""
    models, count = weights.shape
    words = np.empty((_CHUNK, 4, _TILE), np.uint32)
    sums = np.empty((_TILE, 32), np.int32)
    for tile in range(0, out.shape[1] // 128, _TILE):
        blocks = min(_TILE, out.shape[1] // 128 - tile)
        for start in range(0, count, _CHUNK):
            now = min(_CHUNK, count - start)
            for k in range(now):
                _words(words[k], seeds[start + k], low, high, first + tile)
            for m in range(models):
                for word in range(4):
                    sums[:] = 0
                    for k in range(0, now, 4):
                        _add_four(sums, words, weights[m], word, k, now, start)
                    for block in range(blocks):
                        at = (tile + block) * 128 + word * 32
                        for j in range(32):
                            out[m, at + j] += sums[block, j]


@njit(inline="always")
def _add_four(sums, words, weights, word, k, now, start):
    """Add the weights of seeds k to k + 3, with one load and one store of the sums for all four."""
    a, b, c, d = k, min(k + 1, now - 1), min(k + 2, now - 1), min(k + 3, now - 1)
    wa = weights[start + a]
    wb = weights[start + b] if k + 1 < now else np.int32(0)
    wc = weights[start + c] if k + 2 < now else np.int32(0)
    wd = weights[start + d] if k + 3 < now else np.int32(0)
    for block in range(_TILE):
        xa, xb, xc, xd = words[a, word, block], words[b, word, block], words[c, word, block], words[d, word, block]
        for j in range(32):
            shift = np.uint32(31 - j)  # bit j becomes the sign, and the sign all bits
            total = sums[block, j]
            total += (np.int32(xa << shift) >> np.int32(31)) & wa
            total += (np.int32(xb << shift) >> np.int32(31)) & wb
            total += (np.int32(xc << shift) >> np.int32(31)) & wc
            total += (np.int32(xd << shift) >> np.int32(31)) & wd
            sums[block, j] = total


@njit(inline="always")
def _normals(first, second, one, other):
    """Fill `one` and `other` with normal variates in units of 2^-20, operation by operation as in prng.py."""
    for i in range(len(first)):
        odd = (first[i] >> np.uint32(9) << np.uint32(1)) + np.uint32(1)
        bits = np.float32(np.float32(np.int32(odd)) * _U_UNIT).view(np.int32)
        exponent = np.int32(np.int32(bits - _ROOT) >> np.int32(23))
        x = np.int32(bits - np.int32(exponent << np.int32(23))).view(np.float32) - _ONE
        square = x * x
        log = (square * x) * (
            (((((_L6 * x + _L5) * x + _L4) * x + _L3) * x + _L2) * x + _L1) * x + _L0
        ) + square * -_HALF_ONE
        log = (log + x) + np.float32(exponent) * _LN_2
        length = np.sqrt(log * -_TWO) * _SCALE

        quarter = np.uint32(second[i] + np.uint32(1 << 29)) >> np.uint32(30)
        angle = np.float32(np.int32(second[i] - np.uint32(quarter << np.uint32(30)))) * _RADIANS
        square = angle * angle
        sine = (square * angle) * ((_S2 * square + _S1) * square + _S0) + angle
        cosine = ((square * square) * ((_C2 * square + _C1) * square + _C0) + square * -_HALF_ONE) + _ONE
        turned = quarter & np.uint32(1)
        a, b = (sine, cosine) if turned else (cosine, sine)
        a = -a if (quarter + np.uint32(1)) & np.uint32(2) else a
        b = -b if quarter & np.uint32(2) else b
        one[i], other[i] = np.int32(np.rint(length * a)), np.int32(np.rint(length * b))


@_compiled
def _add_normals(seeds, weights, low, high, first, out):
    """Add weight * variate, in units, to out, shape (models, 4 n)."""
    words, z = np.empty((4, _TILE), np.uint32), np.empty((4, _TILE), np.int32)
    sums = np.empty((len(weights), 4, _TILE), np.int64)
    for tile in range(0, out.shape[1] // 4, _TILE):
        blocks = min(_TILE, out.shape[1] // 4 - tile)
        sums[:] = 0
        for k in range(len(seeds)):
            _words(words, seeds[k], low, high, first + tile)
            _normals(words[0], words[1], z[0], z[1])
            _normals(words[2], words[3], z[2], z[3])
            for m in range(len(weights)):
                weight = np.int64(weights[m, k])
                for j in range(4):
                    for block in range(_TILE):
                        sums[m, j, block] += weight * np.int64(z[j, block])
        for m in range(len(weights)):
            for block in range(blocks):
                for j in range(4):
                    out[m, (tile + block) * 4 + j] += sums[m, j, block]


@_compiled
def _axpy_signs(seed, scale, low, high, start, base, out):
    """Write base + scale * signs to out; base[0] is element `start`."""
    words, z = np.empty((4, _TILE), np.uint32), np.empty(_TILE * 128, np.uint32)
    plain = np.float32(scale).view(np.uint32)
    first, stop = start // (128 * _TILE) * _TILE, start + len(base)
    for block in range(first, -(-stop // 128), _TILE):
        _words(words, seed, low, high, block)
        for i in range(_TILE):
            for word in range(4):
                bits, at = ~words[word, i], i * 128 + word * 32
                for j in range(32):
                    z[at + j] = plain ^ (bits >> np.uint32(j) << np.uint32(31))
        _add_part(z.view(np.float32), block * 128, start, stop, base, out)


@_compiled
def _axpy_normals(seed, scale, low, high, start, base, out):
    """Write base + scale * normal variates to out; base[0] is element `start`."""
    words, units, z = np.empty((4, _TILE), np.uint32), np.empty((4, _TILE), np.int32), np.empty((_TILE, 4), np.float32)
    first, stop = start // (4 * _TILE) * _TILE, start + len(base)
    for block in range(first, -(-stop // 4), _TILE):
        _words(words, seed, low, high, block)
        _normals(words[0], words[1], units[0], units[1])
        _normals(words[2], words[3], units[2], units[3])
        for i in range(_TILE):
            for j in range(4):
                z[i, j] = np.float32(units[j, i]) * _UNIT * scale
        _add_part(z.reshape(-1), block * 4, start, stop, base, out)


@njit(inline="always")
def _add_part(z, at, start, stop, base, out):
    first, last = max(at, start), min(at + len(z), stop)
    z, base, out = z[first - at : last - at], base[first - start : last - start], out[first - start : last - start]
    for i in range(len(z)):
        out[i] = base[i] + z[i]
