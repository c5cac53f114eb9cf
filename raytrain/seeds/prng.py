"""The counter-based random number generator of directions, specified in NumPy for all kernels.

The noise of a direction has one value for each element of each parameter. A value depends on the seed, the parameter's
name and the element's flat index in the whole parameter. It does not depend on the order, the sharding, the device or
the number of threads in which values are generated.

Random bits come from Philox 4x32-10 (Salmon et al. 2011), a keyed hash of a counter:

* key: the low and the high 32 bits of the seed, an unsigned 64-bit integer;
* counter: the low and the high 32 bits of the block index, then those of the parameter id: the first 8 bytes of the
  BLAKE2b hash of the parameter's name in UTF-8, little-endian.

A block of four 32-bit words is transformed to one of two distributions:

* "rademacher": 128 signs. Element 128 b + 32 w + j is +1 if bit j of word w of block b is set, and -1 if not.
* "gaussian": 4 normal variates (Box and Muller 1958). Words 0 and 1 of block b give elements 4 b and 4 b + 1, words 2
  and 3 give 4 b + 2 and 4 b + 3: with u = (first // 2^9 + 1/2) / 2^23 and t = second / 2^32 they are
  sqrt(-2 ln u) cos(2 pi t) and sqrt(-2 ln u) sin(2 pi t), to 1e-6. They are multiples of 2^-20. Every operation is
  rounded by IEEE 754, without fused multiply-adds, so all kernels return the same bits.

Derived seeds, of a pool or of a run's steps and workers, are words 0 (low) and 1 (high) of a block whose key is the
parent seed and whose counter holds up to four 32-bit integers; see `fold_in`.

A value is a small integer times the unit of its distribution. So sums over seeds can be accumulated in integers, whose
order does not matter.

Any change here changes what every seed means; tests/golden holds the values.
"""

import hashlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Distribution = Literal["rademacher", "gaussian"]
UNITS: dict[Distribution, float] = {"rademacher": 1.0, "gaussian": 2.0**-20}
PER_BLOCK: dict[Distribution, int] = {"rademacher": 128, "gaussian": 4}

PHILOX_ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF
MOST_NUMBERS = 4
"""Of a position, from which a seed is derived."""
BAD_POSITION = "position: expected up to four integers from 0 to 2^32 - 1; got {}"

# Minimax polynomials, all in float32: ln(1 + x) = x - x^2 / 2 + x^3 LOG(x) for sqrt(1/2) <= 1 + x < sqrt(2), and
# sin a = a + a^3 SIN(a^2), cos a = 1 - a^2 / 2 + a^4 COS(a^2) for |a| <= pi / 4; lowest power first.
LOG = (
    0.3333404064178467,
    -0.2500152587890625,
    0.19958823919296265,
    -0.16570624709129333,
    0.14947941899299622,
    -0.14326901733875275,
    0.08686011284589767,
)
SIN = (-0.16666650772094727, 0.00833197869360447, -0.00019495624292176217)
COS = (0.04166664555668831, -0.001388736767694354, 2.4438440959784202e-05)
ROOT_HALF_BITS = 0x3F3504F3

PhiloxWords = NDArray[np.uint32]
QuantisedNoise = NDArray[np.int32]
SeedArray = NDArray[np.uint64]


def parameter_id(name: str) -> int:
    """Return the 64-bit hash of a parameter's name, which keys its noise."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def philox(counters: PhiloxWords, keys: PhiloxWords) -> PhiloxWords:
    """Return Philox 4x32-10 of counters, shape (..., 4), under keys, shape (..., 2), broadcast.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    words = _philox_rounds(
        [counters[..., word].astype(np.uint64) for word in range(4)],
        [keys[..., word].astype(np.uint64) for word in range(2)],
    )
    return np.stack(np.broadcast_arrays(*words), axis=-1).astype(np.uint32)


def _philox_rounds(counter: list[Any], key: list[Any]) -> list[Any]:
    """Return the words of blocks: of many, as arrays of 64-bit integers, or of one, as integers, which is faster."""
    for _ in range(PHILOX_ROUNDS):
        first, second = counter[0] * MULTIPLIERS[0], counter[2] * MULTIPLIERS[1]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & LOW,
            (first >> 32) ^ counter[3] ^ key[1],
            first & LOW,
        ]
        key = [(key[0] + KEY_STEPS[0]) & LOW, (key[1] + KEY_STEPS[1]) & LOW]
    return counter


def philox_blocks(seed: int, parameter: int, start: int, stop: int) -> PhiloxWords:
    """Return the words of blocks `start` to `stop` of a parameter, by its id, shape (stop - start, 4)."""
    counters = np.empty((stop - start, 4), np.uint32)
    indices = np.arange(start, stop, dtype=np.uint64)
    counters[:, 0], counters[:, 1] = indices & np.uint64(LOW), indices >> np.uint64(32)
    counters[:, 2], counters[:, 3] = parameter & LOW, parameter >> 32
    return philox(counters, np.array([seed & LOW, seed >> 32], np.uint32))


def validate_seed(seed: int) -> int:
    """Return the seed if it is an unsigned 64-bit integer.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected an integer from 0 to 2^64 - 1; got {seed}; take it % 2**64")
    return seed


def fold_in(master: int, *position: int) -> int:
    """Derive a seed from a master seed and up to four 32-bit integers, as `jax.random.fold_in` does.

    Raises:
        ValueError: there are more integers, or larger ones.
    """
    numbers = [int(number) for number in position]
    if len(numbers) > MOST_NUMBERS or not all(0 <= number <= LOW for number in numbers):
        raise ValueError(BAD_POSITION.format(position))
    key = [validate_seed(master) & LOW, master >> 32]
    low, high, *_ = _philox_rounds([*numbers, *[0] * (MOST_NUMBERS - len(numbers))], key)
    seed: int = low | high << 32
    return seed


def fold_in_all(masters: int | SeedArray, *position: int | NDArray[np.integer]) -> SeedArray:
    """Derive many seeds: `fold_in` of each master and position, shapes broadcast against each other.

    Raises:
        ValueError: as `fold_in`.
    """
    numbers = [np.asarray(number) for number in position]
    if len(numbers) > MOST_NUMBERS or not all(((number >= 0) & (number <= LOW)).all() for number in numbers):
        raise ValueError(BAD_POSITION.format(position))
    keys = np.asarray(masters, np.uint64)
    counters = [
        number.astype(np.uint32) for number in (*numbers, *[np.zeros((), np.uint32)] * (MOST_NUMBERS - len(position)))
    ]
    words = philox(
        np.stack(np.broadcast_arrays(*counters), axis=-1),
        np.stack([keys & np.uint64(LOW), keys >> np.uint64(32)], axis=-1).astype(np.uint32),
    ).astype(np.uint64)
    seeds: SeedArray = words[..., 0] | words[..., 1] << np.uint64(32)
    return seeds


def quantised_noise(distribution: Distribution, seed: int, parameter: int, start: int, stop: int) -> QuantisedNoise:
    """Return the noise of elements `start` to `stop` in units of the distribution, shape (stop - start,)."""
    size = PER_BLOCK[distribution]
    first = start // size
    values = TRANSFORMS[distribution](philox_blocks(seed, parameter, first, -(-stop // size)))
    skip = start - first * size
    return values[skip : skip + stop - start]


def noise(distribution: Distribution, seed: int, parameter: int, start: int, stop: int) -> NDArray[np.float32]:
    """Return the noise of elements `start` to `stop`, shape (stop - start,)."""
    return quantised_noise(distribution, seed, parameter, start, stop).astype(np.float32) * np.float32(
        UNITS[distribution]
    )


def _signs(words: PhiloxWords) -> QuantisedNoise:
    bits = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")
    return bits.astype(np.int32) * 2 - 1


def _normals(words: PhiloxWords) -> QuantisedNoise:
    first, second = words.reshape(-1, 2).T
    u = ((first >> 9 << 1) + 1).astype(np.float32) * np.float32(2.0**-24)
    exponent = (u.view(np.int32) - ROOT_HALF_BITS) >> 23
    x = (u.view(np.int32) - (exponent << 23)).view(np.float32) - np.float32(1)
    square = x * x
    log = (square * x) * _polynomial(x, LOG) + square * np.float32(-0.5)
    log = (log + x) + exponent.astype(np.float32) * np.float32(np.log(2))
    length = np.sqrt(log * np.float32(-2)) * np.float32(2**20)

    quarter = (second + np.uint32(1 << 29)) >> 30
    angle = (second - (quarter << 30)).view(np.int32).astype(np.float32) * np.float32(2 * np.pi / 2**32)
    square = angle * angle
    sine = (square * angle) * _polynomial(square, SIN) + angle
    cosine = ((square * square) * _polynomial(square, COS) + square * np.float32(-0.5)) + np.float32(1)
    turned = quarter % 2 == 1
    one = length * np.where(turned, sine, cosine) * np.where((quarter + 1) // 2 % 2, np.float32(-1), np.float32(1))
    other = length * np.where(turned, cosine, sine) * np.where(quarter // 2 % 2, np.float32(-1), np.float32(1))
    values: QuantisedNoise = np.rint(np.stack([one, other], axis=-1).reshape(-1)).astype(np.int32)
    return values


def _polynomial(x: NDArray[np.float32], coefficients: tuple[float, ...]) -> NDArray[np.float32]:
    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + np.float32(coefficient)
    return total


TRANSFORMS: dict[Distribution, Callable[[PhiloxWords], QuantisedNoise]] = {"rademacher": _signs, "gaussian": _normals}
