"""Every report that a run has used, in the order in which it was added up: the run can be repeated from it.

A line of JSON says what the run is known by. Then each round has its number and how many reports follow, and each
report its client, its examples and its numbers as they were sent. Directions are not written: they are drawn again.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Self

from federated.encodings import Cursor, PayloadError
from federated.global_model import GlobalModel
from federated.protocols.protocol import ClientReport, Protocol
from raytrain.errors import CheckpointError
from raytrain.files import write_atomic

MAGIC = b"raytrain federated rounds 1\n"
ROUND = struct.Struct("<IH")
LOG_ENTRY = struct.Struct("<II")


class RoundLog:
    """The file of a run that goes on.

    Args:
        path: the file.
        about: what the run is known by.
        protocol: of the run.
        version: rounds that are done; those that the file has beyond are dropped.

    Raises:
        CheckpointError: the run goes on, and the file is not there, is of another run, or lacks a round.
    """

    def __init__(self, path: Path, about: Mapping[str, str], protocol: Protocol, version: int) -> None:
        self._protocol = protocol
        head = MAGIC + json.dumps(about, sort_keys=True).encode() + b"\n"
        kept = _rounds(path, head, protocol, version) if version else b""
        write_atomic(path, head + kept)
        self._file: IO[bytes] = path.open("ab")

    def append(self, round_number: int, reports: list[ClientReport]) -> None:
        """Add a round, on the disk when this returns: the state that counts on it is saved after it."""
        entries = [
            LOG_ENTRY.pack(report.client, report.examples) + self._protocol.encoding.write(report.scalars)
            for report in reports
        ]
        self._file.write(ROUND.pack(round_number, len(reports)) + b"".join(entries))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()


def replay(path: Path, protocol: Protocol, base: str) -> GlobalModel:
    """Return the model that a log's reports make, with a protocol as the run began with.

    Raises:
        CheckpointError: the file is no log of rounds.
    """
    content = path.read_bytes()
    if not content.startswith(MAGIC) or b"\n" not in content[len(MAGIC) :]:
        raise CheckpointError(f"{path}: expected a log of rounds, as a federated run writes")
    cursor, model = Cursor(content), protocol.initial(base)
    cursor.read(content.index(b"\n", len(MAGIC)) + 1, "a head")
    for reports in _read(cursor, protocol):
        model = protocol.advance(model, protocol.summarise(reports))
        protocol.observe(reports)
    return model


def _read(cursor: Cursor, protocol: Protocol) -> Iterator[list[ClientReport]]:
    """Yield the reports of each round that is there as a whole."""
    steps, size = protocol.options.local_steps, protocol.encoding.size(protocol.options.local_steps)
    while cursor.left() >= ROUND.size:
        round_number, heard = ROUND.unpack(cursor.read(ROUND.size, "a round"))
        if cursor.left() < heard * (LOG_ENTRY.size + size):
            return
        reports = []
        for _ in range(heard):
            client, examples = LOG_ENTRY.unpack(cursor.read(LOG_ENTRY.size, "a client"))
            scalars = protocol.encoding.read(cursor.read(size, "scalars"), steps)
            reports.append(ClientReport(client, examples, scalars, protocol.directions(round_number, client)))
        yield reports


def _rounds(path: Path, head: bytes, protocol: Protocol, version: int) -> bytes:
    """Return the first rounds of a file."""
    content = path.read_bytes() if path.is_file() else b""
    if not content.startswith(head):
        raise CheckpointError(f"{path}: expected the log of this run; it is not there, or is another's")
    entry = LOG_ENTRY.size + protocol.encoding.size(protocol.options.local_steps)
    cursor = Cursor(content[len(head) :])
    try:
        for number in range(version):
            _, heard = ROUND.unpack(cursor.read(ROUND.size, f"round {number}"))
            cursor.read(heard * entry, f"round {number}")
    except PayloadError as error:
        raise CheckpointError(f"{path}: expected {version} rounds: {error}") from error
    return content[len(head) : len(content) - cursor.left()]
