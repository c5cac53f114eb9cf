"""The Triton programs of triton_gpu.py, operation by operation as in prng.py.

They consist of Triton's built-in operations only, which its interpreter supports, so the bits are tested without a GPU.
"""

import math

import triton
import triton.language as tl

from raytrain.seeds import prng

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the functions below are interpreted, on CPU tensors; Triton decides this when it decorates them."""

CHUNK = 64
"""Seeds whose weights, below 2^25 in magnitude, are summed in 32 bits."""

_ROUNDS = tl.constexpr(prng.PHILOX_ROUNDS)
_M0, _M1 = tl.constexpr(prng.MULTIPLIERS[0]), tl.constexpr(prng.MULTIPLIERS[1])
_W0, _W1 = tl.constexpr(prng.KEY_STEPS[0]), tl.constexpr(prng.KEY_STEPS[1])
_ROOT = tl.constexpr(prng.ROOT_HALF_BITS)
_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (tl.constexpr(value) for value in prng.LOG)
_S0, _S1, _S2 = (tl.constexpr(value) for value in prng.SIN)
_C0, _C1, _C2 = (tl.constexpr(value) for value in prng.COS)
_LN_2 = tl.constexpr(math.log(2))
_RADIANS = tl.constexpr(2 * math.pi / 2**32)
_UNIT = tl.constexpr(prng.UNITS["gaussian"])
_SCALE = tl.constexpr(1 / prng.UNITS["gaussian"])
_U_UNIT = tl.constexpr(2.0**-24)
_EIGHTH_TURN = tl.constexpr(1 << 29)
_TO_INTEGER = tl.constexpr(2.0**23)  # floats from here to 2^24 are the integers, and their last bits count up
_TO_INTEGER_BITS = tl.constexpr(0x4B000000)
_BFLOAT16_NAN = tl.constexpr(0x7FC0)


@triton.jit
def _words(block, low, high, seed_low, seed_high):
    """Return the four words of each block."""
    c0, c1, c2, c3 = block.to(tl.uint32), (block >> 32).to(tl.uint32), low.to(tl.uint32), high.to(tl.uint32)
    k0, k1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        first, second = c0, c2
        c0 = tl.umulhi(second, _M1) ^ c1 ^ k0
        c1 = tl.mul(second, _M1, sanitize_overflow=False)
        c2 = tl.umulhi(first, _M0) ^ c3 ^ k1
        c3 = tl.mul(first, _M0, sanitize_overflow=False)
        k0 = tl.add(k0, _W0, sanitize_overflow=False)
        k1 = tl.add(k1, _W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _normals(first, second):
    """Return the two normal variates of two words, in units of 2^-20."""
    u = ((first >> 9 << 1) + 1).to(tl.float32) * _U_UNIT
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - _ROOT) >> 23
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    square = x * x
    log = (square * x) * ((((((_L6 * x + _L5) * x + _L4) * x + _L3) * x + _L2) * x + _L1) * x + _L0) + square * -0.5
    log = (log + x) + exponent.to(tl.float32) * _LN_2
    length = tl.sqrt_rn(log * -2.0) * _SCALE

    quarter = tl.add(second, _EIGHTH_TURN, sanitize_overflow=False) >> 30
    rest = tl.sub(second, quarter << 30, sanitize_overflow=False)
    angle = rest.to(tl.int32, bitcast=True).to(tl.float32) * _RADIANS
    square = angle * angle
    sine = (square * angle) * ((_S2 * square + _S1) * square + _S0) + angle
    cosine = ((square * square) * ((_C2 * square + _C1) * square + _C0) + square * -0.5) + 1.0
    turned = (quarter & 1) != 0
    one = _rounded(length * tl.where(turned, sine, cosine), ((quarter + 1) & 2) != 0)
    return one, _rounded(length * tl.where(turned, cosine, sine), (quarter & 2) != 0)


@triton.jit
def _rounded(x, negated):
    """Round x, below 2^23 in magnitude, to the nearest integer, ties to even; negate it where `negated`."""
    size = (tl.abs(x) + _TO_INTEGER).to(tl.int32, bitcast=True) - _TO_INTEGER_BITS
    return tl.where((x < 0) != negated, -size, size)


@triton.jit
def _add(pointer, value, mask):
    tl.store(pointer, tl.load(pointer, mask=mask, other=0) + value, mask=mask)


@triton.jit
def _load(pointer, mask):
    """Load values as float32. bfloat16 is widened by bits: Triton's interpreter loses subnormals."""
    value = tl.load(pointer, mask=mask, other=0)
    if pointer.dtype.element_ty == tl.bfloat16:
        value = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _store(pointer, value, mask):
    """Store float32 values, rounded to the pointer's type, to nearest with ties to even.

    bfloat16 is rounded by bits: Triton's interpreter rounds otherwise than GPUs.
    """
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = tl.add(bits, 0x7FFF + ((bits >> 16) & 1), sanitize_overflow=False) >> 16
        rounded = tl.where(value == value, rounded, _BFLOAT16_NAN)  # noqa: PLR0124
        tl.store(pointer, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["piece_step", "low", "high", "start", "size", "model_count", "count", "piece"])
def add_signs(
    seeds,
    weights,
    out,
    piece_step: tl.int64,
    model_step,
    step,
    low: tl.int32,
    high: tl.int32,
    start: tl.int64,
    size: tl.int64,
    model_count: tl.int32,
    count: tl.int32,
    piece: tl.int32,
    blocks: tl.constexpr,
    models: tl.constexpr,
    words: tl.constexpr,
    chunk: tl.constexpr,
):
    """Add weighted sums of signs to `out`, shape (pieces, models, size).

    A program handles some blocks, a chunk of the seeds, and several models that share its noise. It covers one, two or
    all four words of its blocks, so that a thread, which handles whole blocks, keeps words and sums in registers.
    """
    parts: tl.constexpr = 4 // words
    part, group = tl.program_id(2) % parts, tl.program_id(2) // parts
    block = start // 128 + tl.program_id(0).to(tl.int64) * blocks + tl.arange(0, blocks)
    model = group * models + tl.arange(0, models)
    bit = part * (words * 32) + tl.arange(0, words * 32)
    word, shift = (bit // 32)[:, None], (bit % 32).to(tl.uint32)[:, None]
    place = block[None, :] * 128 + bit[:, None] - start
    mask = (model < model_count)[:, None, None] & ((place >= 0) & (place < size))[None, :, :]
    pointer = out + tl.program_id(1) * piece_step + model.to(tl.int64)[:, None, None] * model_step
    pointer += place[None, :, :] * step
    begin = tl.program_id(1) * piece
    end = tl.minimum(begin + piece, count)
    for first in range(begin, end, chunk):
        sums = tl.full((models, words * 32, blocks), 0, tl.int32)
        total = tl.full((models,), 0, tl.int32)
        for k in range(first, tl.minimum(first + chunk, end)):
            seed = tl.load(seeds + k)
            weight = tl.load(weights + model.to(tl.int64) * count + k, mask=model < model_count, other=0)
            w0, w1, w2, w3 = _words(block, low, high, seed, seed >> 32)
            drawn = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
            sums += ((drawn >> shift) & 1).to(tl.int32)[None, :, :] * weight[:, None, None]
            total += weight
        # Weights with the bit set minus the others, 2 * sums - total: it fits 32 bits, though 2 * sums may wrap.
        doubled = tl.add(sums, sums, sanitize_overflow=False)
        _add(pointer, tl.sub(doubled, total[:, None, None], sanitize_overflow=False).to(tl.int64), mask)


@triton.jit(do_not_specialize=["piece_step", "low", "high", "start", "size", "model_count", "count", "piece"])
def add_normals(
    seeds,
    weights,
    out,
    piece_step: tl.int64,
    model_step,
    step,
    low: tl.int32,
    high: tl.int32,
    start: tl.int64,
    size: tl.int64,
    model_count: tl.int32,
    count: tl.int32,
    piece: tl.int32,
    blocks: tl.constexpr,
    models: tl.constexpr,
):
    """Add weighted sums of normal variates to `out`, shape (pieces, models, size).

    A program handles some blocks, a chunk of the seeds, and several models that share its noise.
    """
    block = start // 4 + tl.program_id(0).to(tl.int64) * blocks + tl.arange(0, blocks)
    model = tl.program_id(2) * models + tl.arange(0, models)
    s0, s1 = tl.full((models, blocks), 0, tl.int64), tl.full((models, blocks), 0, tl.int64)
    s2, s3 = s0, s1
    begin = tl.program_id(1) * piece
    for k in range(begin, tl.minimum(begin + piece, count)):
        seed = tl.load(seeds + k)
        weight = tl.load(weights + model.to(tl.int64) * count + k, mask=model < model_count, other=0)
        weight = weight.to(tl.int64)[:, None]
        w0, w1, w2, w3 = _words(block, low, high, seed, seed >> 32)
        z0, z1 = _normals(w0, w1)
        z2, z3 = _normals(w2, w3)
        s0, s1 = s0 + weight * z0.to(tl.int64), s1 + weight * z1.to(tl.int64)
        s2, s3 = s2 + weight * z2.to(tl.int64), s3 + weight * z3.to(tl.int64)
    place = (block * 4 - start)[None, :]
    known = (model < model_count)[:, None]
    pointer = out + tl.program_id(1) * piece_step + model.to(tl.int64)[:, None] * model_step + place * step
    _add(pointer, s0, known & (place >= 0) & (place < size))
    _add(pointer + step, s1, known & (place >= -1) & (place < size - 1))
    _add(pointer + 2 * step, s2, known & (place >= -2) & (place < size - 2))
    _add(pointer + 3 * step, s3, known & (place >= -3) & (place < size - 3))


@triton.jit(do_not_specialize=["low", "high", "seed_low", "seed_high", "scale", "tiles"])
def axpy_signs(
    base,
    out,
    rows,
    width: tl.int64,
    tiles: tl.int32,
    low: tl.int32,
    high: tl.int32,
    start: tl.int64,
    seed_low: tl.int32,
    seed_high: tl.int32,
    scale: tl.int32,
    words: tl.constexpr,
):
    """Write base + scale * signs to `out`; a program handles some words of one row."""
    to = (tl.program_id(0) // tiles).to(tl.int64)
    row = to if rows is None else tl.load(rows + to)
    first = start + row * width
    word = first // 32 + (tl.program_id(0) % tiles).to(tl.int64) * words + tl.arange(0, words)
    w0, w1, w2, w3 = _words(word >> 2, low, high, seed_low, seed_high)
    which = word & 3
    drawn = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    bit = tl.arange(0, 32)
    is_set = (drawn[:, None] >> bit.to(tl.uint32)[None, :]) & 1
    plain = scale.to(tl.float32, bitcast=True)
    place = word[:, None] * 32 + bit[None, :] - first
    mask = (place >= 0) & (place < width)
    moved = _load(base + row * width + place, mask) + tl.where(is_set != 0, plain, -plain)
    _store(out + to * width + place, moved, mask)


@triton.jit(do_not_specialize=["low", "high", "seed_low", "seed_high", "scale", "tiles"])
def axpy_normals(
    base,
    out,
    rows,
    width: tl.int64,
    tiles: tl.int32,
    low: tl.int32,
    high: tl.int32,
    start: tl.int64,
    seed_low: tl.int32,
    seed_high: tl.int32,
    scale: tl.int32,
    blocks: tl.constexpr,
):
    """Write base + scale * normal variates to `out`; a program handles some blocks of one row."""
    to = (tl.program_id(0) // tiles).to(tl.int64)
    row = to if rows is None else tl.load(rows + to)
    first = start + row * width
    at = first // 4 + (tl.program_id(0) % tiles).to(tl.int64) * blocks
    w0, w1, w2, w3 = _words(at + tl.arange(0, blocks), low, high, seed_low, seed_high)
    z0, z1 = _normals(w0, w1)
    z2, z3 = _normals(w2, w3)
    drawn = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (blocks * 4,))
    place = at * 4 + tl.arange(0, blocks * 4) - first
    mask = (place >= 0) & (place < width)
    added = drawn.to(tl.float32) * _UNIT * scale.to(tl.float32, bitcast=True)
    _store(out + to * width + place, _load(base + row * width + place, mask) + added, mask)
