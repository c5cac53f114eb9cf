"""The store of a search: packed states, named by their hash."""

import hashlib
import re
from collections.abc import Collection
from pathlib import Path

from raytrain.errors import CheckpointError
from raytrain.files import write_atomic

NAME = re.compile(r"^[0-9a-f]{64}\.state$")
LEFTOVER = re.compile(r"^\.[0-9a-f]{64}\.state\.[0-9a-f]{32}\.tmp$")


class StateStore:
    """Packed states in a folder, each complete or absent.

    Args:
        folder: of the states; made when the first one is stored.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, state: bytes) -> str:
        """Store a state and return its name, the SHA-256 of its bytes.

        Raises:
            OSError: it cannot be written.
        """
        digest = hashlib.sha256(state).hexdigest()
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._folder / f"{digest}.state", state)
        return digest

    def get(self, digest: str) -> bytes:
        """Return a state.

        Raises:
            CheckpointError: it is missing, or not what was stored.
        """
        file = self._folder / f"{digest}.state"
        try:
            state = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
        if hashlib.sha256(state).hexdigest() != digest:
            raise CheckpointError(f"{file}: its contents changed since it was written")
        return state

    def collect(self, needed: Collection[str]) -> None:
        """Remove the states that are not needed; files that the store did not write stay."""
        names = {f"{digest}.state" for digest in needed}
        for file in self._folder.glob("*.state"):
            if NAME.match(file.name) and file.name not in names:
                file.unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove what a killed process left half-written; only for the one process that writes."""
        for file in self._folder.glob(".*.tmp"):
            if LEFTOVER.match(file.name):
                file.unlink(missing_ok=True)
