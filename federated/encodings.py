"""Numbers as bytes and back: what clients measure, the coefficients of a model, and indices in a pool."""

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raytrain.errors import RaytrainError
from raytrain.sync.scalars import decode_one_byte, encode_one_byte

Floats = NDArray[np.float32]
Coefficients = NDArray[np.float64]
Reals = NDArray[np.floating]

EXPONENTS = range(-1000, 1001)
UNSCALED = np.zeros(1, np.int32)
"""Exponent of the middle level of one byte, for all numbers: 1."""


class PayloadError(RaytrainError):
    """Bytes are not what they must be: the message says what was expected and what came."""


class Cursor:
    """Reads a payload from its start to its end, and never beyond.

    Args:
        data: the payload.
    """

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._offset = 0

    def read(self, size: int, what: str) -> bytes:
        """Return the next bytes.

        Raises:
            PayloadError: there are fewer.
        """
        left = len(self._data) - self._offset
        if size > left:
            raise PayloadError(f"expected {size} bytes of {what}; got {left}")
        self._offset += size
        return bytes(self._data[self._offset - size : self._offset])

    def left(self) -> int:
        """Return how many bytes are left."""
        return len(self._data) - self._offset

    def end(self) -> None:
        """Check that nothing is left.

        Raises:
            PayloadError: something is.
        """
        if self.left():
            raise PayloadError(f"expected no more bytes; got {self.left()}")


def write_indices(indices: NDArray[np.int64]) -> bytes:
    """Return indices in a pool, two bytes each."""
    return indices.astype("<u2").tobytes()


def read_indices(cursor: Cursor, count: int, pool: int) -> NDArray[np.int64]:
    """Read `count` indices of seeds in a pool.

    Raises:
        PayloadError: there are fewer, or one is outside of the pool.
    """
    indices = np.frombuffer(cursor.read(2 * count, "indices in the pool"), "<u2").astype(np.int64)
    if count and indices.max() >= pool:
        raise PayloadError(f"expected indices below {pool}; got {indices.max()}")
    return indices


@dataclass(frozen=True, slots=True)
class Encoding:
    """How projected gradients are written, each by itself.

    Attributes:
        bits: of each number.
        write: numbers -> bytes; what is not finite, or beyond the encoding, becomes nan, if the encoding has it.
        read: (bytes, how many) -> numbers; nan is for one that is not used.
    """

    bits: int
    write: Callable[[Reals], bytes]
    read: Callable[[bytes, int], Floats]

    def size(self, count: int) -> int:
        """Return the bytes of `count` numbers."""
        return -(-count * self.bits // 8)

    def can_write(self, value: float) -> bool:
        """Return whether a number can be written: one bit has no room for 0, and nothing for nan."""
        return not np.isnan(value) and (value != 0 or self.bits > 1)

    def rounded(self, value: float) -> float:
        """Return the number that arrives where this one is sent."""
        return float(self.read(self.write(np.array([value])), 1)[0])


def _write_floats(dtype: str) -> Callable[[Reals], bytes]:
    def write(values: Reals) -> bytes:
        with np.errstate(over="ignore"):
            narrow = values.astype(dtype)
        return np.where(np.isfinite(narrow), narrow, np.array(np.nan, dtype)).tobytes()

    return write


def _write_one_byte(values: Reals) -> bytes:
    with np.errstate(over="ignore"):
        return encode_one_byte(values.astype(np.float32), UNSCALED).tobytes()


def _write_signs(values: Reals) -> bytes:
    bits: NDArray[np.uint8] = np.packbits(values > 0, bitorder="little")
    return bits.tobytes()


def _read_signs(data: bytes, count: int) -> Floats:
    bits: NDArray[np.uint8] = np.unpackbits(np.frombuffer(data, np.uint8), count=count, bitorder="little")
    return bits.astype(np.float32) * 2 - 1


ENCODINGS: dict[str, Encoding] = {
    "float32": Encoding(32, _write_floats("<f4"), lambda data, _: np.frombuffer(data, "<f4").astype(np.float32)),
    "float16": Encoding(16, _write_floats("<f2"), lambda data, _: np.frombuffer(data, "<f2").astype(np.float32)),
    "one-byte": Encoding(8, _write_one_byte, lambda data, _: decode_one_byte(np.frombuffer(data, np.uint8), UNSCALED)),
    "sign": Encoding(1, _write_signs, _read_signs),
}
"""Of a client's numbers: "one-byte" is a sign and a logarithm, "sign" is positive or not, and has no nan."""


@dataclass(frozen=True, slots=True)
class CoefficientEncoding:
    """How the coefficients of a model are written; what has been read once is written and read without a change.

    Attributes:
        size: how many -> bytes.
        write: coefficients -> bytes.
        read: (bytes, how many) -> coefficients.
    """

    size: Callable[[int], int]
    write: Callable[[Coefficients], bytes]
    read: Callable[[bytes, int], Coefficients]

    def rounded(self, coefficients: Coefficients) -> Coefficients:
        """Return what arrives where these are sent."""
        return self.read(self.write(coefficients), len(coefficients))


def _write_scaled(coefficients: Coefficients) -> bytes:
    """Write a power of two, which the largest one is just below, and each number over it in half precision."""
    mantissa, exponent = np.frexp(np.abs(coefficients).max(initial=0.0))
    exponent = int(exponent) + int(np.float16(mantissa) == 1)  # the largest may round up to the next power
    power = min(max(exponent - 15, EXPONENTS[0]), EXPONENTS[-1])  # below 2^15: half precision ends at 2^16
    scaled: Coefficients = np.ldexp(coefficients, -power)
    return struct.pack("<h", power) + scaled.astype("<f2").tobytes()


def _read_scaled(data: bytes, count: int) -> Coefficients:
    (power,) = struct.unpack_from("<h", data)
    if power not in EXPONENTS:
        raise PayloadError(f"expected a power of two from -1000 to 1000; got {power}")
    coefficients: Coefficients = np.ldexp(_finite(np.frombuffer(data, "<f2", count, 2)), power)
    return coefficients


def _read_single(data: bytes, count: int) -> Coefficients:
    return _finite(np.frombuffer(data, "<f4", count))


def _finite(values: Reals) -> Coefficients:
    if not np.isfinite(values).all():
        raise PayloadError("expected finite coefficients; some are not")
    return values.astype(np.float64)


COEFFICIENT_ENCODINGS: dict[str, CoefficientEncoding] = {
    "float32": CoefficientEncoding(
        lambda count: 4 * count, lambda values: values.astype("<f4").tobytes(), _read_single
    ),
    "float16": CoefficientEncoding(lambda count: 2 + 2 * count, _write_scaled, _read_scaled),
}
"""Of a model: "float16" is half precision around a power of two that all coefficients share."""
