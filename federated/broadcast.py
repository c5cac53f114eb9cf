"""The global model as a payload, in the form that is smallest for a client, and back.

    whole       all coefficients
    changed     those that changed since the version that the client has, with their indices
    summaries   the summary of each round since then, from which the client advances its own

All three end with the same coefficients, to the bit: the seal of a payload is under their digest. A model of new seeds
in each round has only summaries, those of all rounds.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from federated.encodings import Cursor, PayloadError, read_indices, write_indices
from federated.global_model import GlobalModel
from federated.protocols.protocol import HEARD, Protocol
from federated.sampling import Indices
from federated.wire import MODEL_BYTES, REPORT_BYTES, ModelHeader, has_model_seal, read_model, write_model

FORMS = ("whole", "changed", "summaries")
WHOLE, CHANGED, SUMMARIES = range(3)


class ModelHistory:
    """The server's model, and how each recent version of it becomes the newest.

    Args:
        protocol: how it advances.
        model: to start from.

    Attributes:
        model: the newest.
        changed_at: the version that last changed each coefficient, shape (k,).
        summaries: of the last rounds, oldest first: all that together are smaller than the whole model.
    """

    def __init__(self, protocol: Protocol, model: GlobalModel) -> None:
        self.model = model
        self.changed_at: NDArray[np.uint32] = np.zeros(len(model.coefficients), np.uint32)
        self.summaries: deque[bytes] = deque()
        self._protocol = protocol
        self._bodies: dict[int, tuple[int, bytes]] = {}

    def advance(self, summary: bytes) -> None:
        """Take one more round into the model."""
        before, self.model = self.model, self._protocol.advance(self.model, summary)
        self.summaries.append(summary)
        self._bodies.clear()
        if self._protocol.table.grows:
            return
        self.changed_at[before.coefficients != self.model.coefficients] = self.model.version
        most = self._protocol.coefficients.size(len(self.model.coefficients))
        while sum(map(len, self.summaries)) > most:
            self.summaries.popleft()

    def payload(self, base: int, directions: Indices | None = None) -> bytes:
        """Return the model for a client.

        Args:
            base: the version that it has; 0 is w0, which all have.
            directions: that it is to probe, if the server draws them.
        """
        if base not in self._bodies:
            self._bodies[base] = self._body(base)
        form, body = self._bodies[base]
        drawn = b"" if directions is None else write_indices(directions)
        return write_model(ModelHeader(self.model.version, base, form), drawn + body, self.model.digest)

    def sizes(self, base: int) -> dict[int, int]:
        """Return the bytes of each form that makes the newest model of a version."""
        if self._protocol.table.grows:
            return {SUMMARIES: sum(map(len, self._since(base)))}
        size, changed = self._protocol.coefficients.size, int((self.changed_at > base).sum())
        sizes = {WHOLE: size(len(self.model.coefficients)), CHANGED: 2 * changed + size(changed)}
        if self.model.version - base <= len(self.summaries):
            sizes[SUMMARIES] = sum(map(len, self._since(base)))
        return sizes

    def state(self) -> dict[str, NDArray[Any]]:
        """Return all of it."""
        return {
            "coefficients": self.model.coefficients,
            "version": np.array([self.model.version]),
            "changed_at": self.changed_at,
            "summaries": np.frombuffer(b"".join(self.summaries), np.uint8),
            "lengths": np.array([len(summary) for summary in self.summaries], np.int64),
        }

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take back what `state` returned."""
        self.model = GlobalModel(self.model.origin, state["coefficients"], int(state["version"][0]))
        self.changed_at = state["changed_at"]
        cursor = Cursor(state["summaries"].tobytes())
        self.summaries = deque(cursor.read(length, "a summary") for length in state["lengths"].tolist())
        self._bodies.clear()

    def _since(self, base: int) -> list[bytes]:
        return list(self.summaries)[len(self.summaries) - (self.model.version - base) :]

    def _body(self, base: int) -> tuple[int, bytes]:
        sizes = self.sizes(base)
        form = min(sizes, key=lambda form: sizes[form])
        wanted = self._protocol.options.form
        if wanted != "smallest" and FORMS.index(wanted) in sizes:
            form = FORMS.index(wanted)
        if form == SUMMARIES:
            return form, b"".join(self._since(base))
        if form == WHOLE:
            return form, self._protocol.coefficients.write(self.model.coefficients)
        (indices,) = np.nonzero(self.changed_at > base)
        return form, write_indices(indices) + self._protocol.coefficients.write(self.model.coefficients[indices])


def payload_bytes(protocol: Protocol, heard: int, missed: int) -> tuple[int, int]:
    """Return the bytes down and up of a client, in a round some rounds after the last one that it took part in.

    What changed since then may be smaller; how many coefficients these are depends on the draws.

    Args:
        protocol: of the run.
        heard: clients that were heard in each of these rounds.
        missed: these rounds, of which its last one is the first.
    """
    steps, summaries = protocol.options.local_steps, missed * (HEARD.size + protocol.summary_bytes(heard))
    whole = protocol.coefficients.size(protocol.table.size(0))
    model = summaries if protocol.table.grows else min(whole, summaries)
    drawn = 2 * steps if protocol.sends_directions else 0
    return MODEL_BYTES + drawn + model, REPORT_BYTES + protocol.encoding.size(steps)


def receive(
    data: bytes, protocol: Protocol, newest: GlobalModel, initial: GlobalModel
) -> tuple[GlobalModel, Indices | None]:
    """Return the model that a payload makes, and the directions that the server drew, if it does.

    A payload for a client with some version makes the model of any later one too. So a process that serves many
    clients needs no more than the newest version that one of them was sent.

    Args:
        data: what `ModelHistory.payload` returned.
        protocol: the run's.
        newest: the version that this process has.
        initial: w0.

    Raises:
        PayloadError: the payload is malformed, or makes something else of what this process has.
    """
    header, body = read_model(data)
    forms, most = {SUMMARIES} if protocol.table.grows else {WHOLE, CHANGED, SUMMARIES}, len(protocol.rates.lr)
    if header.form not in forms or not header.base <= header.version <= most:
        raise PayloadError(f"expected a form of {sorted(forms)} and at most version {most}; got {header}")
    cursor, directions = Cursor(body), None
    if protocol.sends_directions:
        directions = read_indices(cursor, protocol.options.local_steps, protocol.table.size(0))
    if newest.version == header.version and has_model_seal(data, newest.digest):
        return newest, directions
    rest = cursor.read(cursor.left(), "a model")
    starts = [model for model in (newest, initial) if header.base <= model.version <= header.version]
    if not starts and header.form != WHOLE:
        raise PayloadError(f"expected a model made of a version that is here; got one made of version {header.base}")
    for start in [initial] if header.form == WHOLE else starts:
        model = _rebuild(header, Cursor(rest), protocol, start)
        if has_model_seal(data, model.digest):
            return model, directions
    raise PayloadError("expected the seal of these coefficients; the payload is damaged, or was made of others")


def _rebuild(header: ModelHeader, cursor: Cursor, protocol: Protocol, start: GlobalModel) -> GlobalModel:
    """Return the model that a payload makes of a version from its base on."""
    if header.form == SUMMARIES:
        model = start
        for version in range(header.base, header.version):
            summary = protocol.next_summary(cursor)
            model = protocol.advance(model, summary) if version >= start.version else model
        cursor.end()
        return model
    size, coefficients = protocol.coefficients.size, start.coefficients.copy()
    if header.form == WHOLE:
        indices = np.arange(len(coefficients))
    else:
        count = max(0, cursor.left() - size(0)) // (2 + size(1) - size(0))
        indices = read_indices(cursor, count, len(coefficients))
    coefficients[indices] = protocol.coefficients.read(cursor.read(size(len(indices)), "coefficients"), len(indices))
    cursor.end()
    return GlobalModel(start.origin, coefficients, header.version)
