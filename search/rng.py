"""Random numbers by name: every draw of a search has a generator of its own."""

import hashlib
import json

import numpy as np


def keyed_generator(seed: int, *key: str | int) -> np.random.Generator:
    """Return the random generator of one purpose.

    Draws under one key do not depend on what is drawn under any other, so a decision does not depend on which member
    reported first. The generator is counter-based (Philox 4x64-10: Salmon et al. 2011); its key is the BLAKE2b hash of
    the seed and the key, so it is the same in every process.

    Args:
        seed: of the search.
        key: what is drawn, for whom and when, as in ("explore", member, generation).

    >>> int(keyed_generator(0, "explore", 3, 1).integers(100))
    51
    """
    name = json.dumps([seed, *key]).encode()
    digest = hashlib.blake2b(name, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def keyed_seed(seed: int, *key: str | int) -> int:
    """Return the seed of one purpose, 31 bits."""
    return int(keyed_generator(seed, *key).integers(2**31))
