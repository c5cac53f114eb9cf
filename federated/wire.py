"""Payloads: what a client reports, and the model that it is sent, as bytes that are checked before they are used.

Both begin with a header of little-endian numbers, of which the last 8 bytes are a seal: a keyed BLAKE2b hash of all the
rest under the digest of the coefficients that the payload is about. So a flipped bit, a report of another model and a
client whose coefficients are not those of the server are all found, without a byte of their own.

    report   version u32, round u16, numbers u16, examples u32, seal;  then the numbers in `Encoding`
    model    version u32, base u16, form u16, seal;                    then what `federated.broadcast` writes

What arrives is data: its exact length is checked before anything is made of it, and every error is a `PayloadError`.
"""

import hashlib
import struct
from dataclasses import dataclass

from federated.encodings import Encoding, Floats, PayloadError

REPORT = struct.Struct("<IHHI")
MODEL_HEADER = struct.Struct("<IHH")
SEAL_BYTES = 8
REPORT_BYTES = REPORT.size + SEAL_BYTES
MODEL_BYTES = MODEL_HEADER.size + SEAL_BYTES
NO_KEY = b"no coefficients"
"""Seals what a client says that has none."""


@dataclass(frozen=True, slots=True)
class ReportHeader:
    """What a report says beside its numbers.

    Attributes:
        version: of the model that its losses are of.
        round: that it answers.
        count: of its numbers.
        examples: that the client has.
    """

    version: int
    round: int
    count: int
    examples: int


def write_report(header: ReportHeader, scalars: bytes, client: int, key: bytes) -> bytes:
    """Return a report.

    Args:
        header: see there.
        scalars: as an `Encoding` wrote them.
        client: whose; it is sealed, and not sent.
        key: the digest of the coefficients.
    """
    fields = REPORT.pack(header.version, header.round % 2**16, header.count, header.examples)
    return fields + _seal(fields + scalars, key, client) + scalars


def write_lost(version: int, round_number: int, client: int) -> bytes:
    """Return the report of a client that cannot make the model of what it was sent: it asks for all of it."""
    return write_report(ReportHeader(version, round_number, 0, 0), b"", client, NO_KEY)


def is_lost(data: bytes, expected: ReportHeader, client: int) -> bool:
    """Return whether a report is what `write_lost` writes."""
    return data == write_lost(expected.version, expected.round, client)


def read_report(data: bytes, expected: ReportHeader, most_examples: int, encoding: Encoding) -> tuple[int, Floats]:
    """Return the number of examples and the numbers of a report, whose seal is still to be checked.

    Args:
        data: the report.
        expected: what it has to say; of its examples, the least.
        most_examples: that it may say.
        encoding: of its numbers.

    Raises:
        PayloadError: it has another length, says something else, or a number is infinite.
    """
    _check_length(data, expected.count, encoding)
    version, round_number, count, examples = REPORT.unpack_from(data)
    for what, wanted, came in (
        ("version", expected.version, version),
        ("round", expected.round % 2**16, round_number),
        ("count", expected.count, count),
    ):
        if came != wanted:
            raise PayloadError(f"expected {what} {wanted}; got {came}")
    if not expected.examples <= examples <= most_examples:
        raise PayloadError(f"expected {expected.examples} to {most_examples} examples; got {examples}")
    return examples, encoding.read(data[REPORT_BYTES:], count)


def _check_length(data: bytes, count: int, encoding: Encoding) -> None:
    body, wanted = len(data) - REPORT_BYTES, encoding.size(count)
    if body == wanted:
        return
    if body >= 0 and encoding.bits >= 8 and body * 8 % encoding.bits == 0:
        raise PayloadError(f"expected {count} numbers; got {body * 8 // encoding.bits}")
    raise PayloadError(f"expected {REPORT_BYTES + wanted} bytes; got {len(data)}")


def check_report_seal(data: bytes, client: int, key: bytes) -> None:
    """Check that a report is of this client and model, and is as it was sent.

    Raises:
        PayloadError: it is not.
    """
    sealed = data[: REPORT.size] + data[REPORT_BYTES:]
    if data[REPORT.size : REPORT_BYTES] != _seal(sealed, key, client):
        raise PayloadError(
            "expected the seal of this client and these coefficients; the report is damaged or another's"
        )


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """What a model payload says of itself.

    Attributes:
        version: of the model that it makes.
        base: the version that it makes it of; without meaning for a form that takes none.
        form: which one.
    """

    version: int
    base: int
    form: int


def write_model(header: ModelHeader, body: bytes, key: bytes) -> bytes:
    """Return a model payload; `key` is the digest of the coefficients that it makes."""
    fields = MODEL_HEADER.pack(header.version, header.base, header.form)
    return fields + _seal(fields + body, key) + body


def read_model(data: bytes) -> tuple[ModelHeader, bytes]:
    """Return the header and the body of a model payload, whose seal is still to be checked.

    Raises:
        PayloadError: it is too short for a header.
    """
    if len(data) < MODEL_BYTES:
        raise PayloadError(f"expected at least {MODEL_BYTES} bytes; got {len(data)}")
    return ModelHeader(*MODEL_HEADER.unpack_from(data)), data[MODEL_BYTES:]


def has_model_seal(data: bytes, key: bytes) -> bool:
    """Return whether a model payload is as it was sent, and makes the coefficients with this digest."""
    return data[MODEL_HEADER.size : MODEL_BYTES] == _seal(data[: MODEL_HEADER.size] + data[MODEL_BYTES:], key)


def _seal(data: bytes, key: bytes, client: int | None = None) -> bytes:
    person = b"model" if client is None else b"report" + struct.pack("<Q", client)
    return hashlib.blake2b(data, digest_size=SEAL_BYTES, key=key, person=person).digest()
