"""What a direction is: the numbers that a seed stands for, in NumPy, as every faster kernel has to give them.

A direction has a number for each element of each parameter of a model. It depends on the seed, on the parameter's name,
and on the element's flat position in the whole parameter, and on nothing else: not on the order, the shard, the device
or the number of threads in which it is drawn.

Words come from Philox 4x32-10 (Salmon et al. 2011), a hash of a counter under a key:

* key: the low and the high 32 bits of the seed, a 64-bit number without sign;
* counter: the low and the high 32 bits of the block's number, then those of the parameter's identity, which is the
  first 8 bytes of the BLAKE2b hash of its name in UTF-8, as a little-endian number.

A block's four words of 32 bits are made into numbers in one of two modes:

* "rademacher": 128 signs. Element 128 b + 32 w + j has bit j of word w of block b: +1 where it is set, -1 where not.
* "gaussian": 4 normal numbers by Box and Muller. Words 0 and 1 of block b make elements 4 b and 4 b + 1, words 2 and 3
  make 4 b + 2 and 4 b + 3: with u = (first // 2^9 + 1/2) / 2^23 and t = second / 2^32 these are
  sqrt(-2 ln u) cos(2 pi t) and sqrt(-2 ln u) sin(2 pi t). Kernels give them to 1e-6.

Changing anything of this makes every seed mean something else: tests/golden holds it.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

SIGNS_PER_BLOCK = 128
NORMALS_PER_BLOCK = 4

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF

Words = NDArray[np.uint32]


def identity(name: str) -> int:
    """Return the number that stands for a parameter's name, 64 bits."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def philox(counters: Words, keys: Words) -> Words:
    """Return Philox 4x32-10 of counters, shape (..., 4), under keys, shape (..., 2); they are broadcast."""
    counter = [counters[..., place].astype(np.uint64) for place in range(4)]
    key = [keys[..., place].astype(np.uint64) for place in range(2)]
    shift = np.uint64(32)
    for _ in range(ROUNDS):
        first, second = counter[0] * np.uint64(MULTIPLIERS[0]), counter[2] * np.uint64(MULTIPLIERS[1])
        counter = [
            (second >> shift) ^ counter[1] ^ key[0],
            second & np.uint64(LOW),
            (first >> shift) ^ counter[3] ^ key[1],
            first & np.uint64(LOW),
        ]
        key = [(part + np.uint64(step)) & np.uint64(LOW) for part, step in zip(key, KEY_STEPS, strict=True)]
    return np.stack(np.broadcast_arrays(*counter), axis=-1).astype(np.uint32)


def blocks(seed: int, parameter: int, start: int, stop: int) -> Words:
    """Return the words of blocks `start` to `stop`, shape (stop - start, 4), of the parameter with this identity."""
    counters = np.empty((stop - start, 4), np.uint32)
    places = np.arange(start, stop, dtype=np.uint64)
    counters[:, 0], counters[:, 1] = places & np.uint64(LOW), places >> np.uint64(32)
    counters[:, 2], counters[:, 3] = parameter & LOW, parameter >> 32
    return philox(counters, np.array([seed & LOW, seed >> 32], np.uint32))


def rademacher(seed: int, parameter: int, start: int, stop: int) -> NDArray[np.int8]:
    """Return the signs of elements `start` to `stop`, 1 or -1, shape (stop - start,)."""
    first = start // SIGNS_PER_BLOCK
    words = blocks(seed, parameter, first, -(-stop // SIGNS_PER_BLOCK))
    bits = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")
    skip = start - first * SIGNS_PER_BLOCK
    return bits[skip : skip + stop - start].astype(np.int8) * 2 - 1


def gaussian(seed: int, parameter: int, start: int, stop: int) -> NDArray[np.float32]:
    """Return the normal numbers of elements `start` to `stop`, shape (stop - start,)."""
    first = start // NORMALS_PER_BLOCK
    words = blocks(seed, parameter, first, -(-stop // NORMALS_PER_BLOCK)).reshape(-1, 2)
    length = np.sqrt(-2 * np.log(((words[:, 0] >> 9) + 0.5) / 2**23))
    angle = words[:, 1] * (2 * np.pi / 2**32)
    normals = np.stack([length * np.cos(angle), length * np.sin(angle)], axis=-1).reshape(-1)
    skip = start - first * NORMALS_PER_BLOCK
    return normals[skip : skip + stop - start].astype(np.float32)
