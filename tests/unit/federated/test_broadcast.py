"""The model as a payload: every form makes the same, and what is damaged makes none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.broadcast import FORMS, payload_bytes
from federated.encodings import PayloadError
from federated.testing import (
    STEPS,
    VARIANTS,
    Receiver,
    Variant,
    equal,
    make_protocol,
    play,
    random_scalars,
    report_of,
    server_of,
)
from federated.wire import MODEL_BYTES, ModelHeader, read_model, write_model


@settings(max_examples=60)
@given(st.sampled_from(VARIANTS), st.lists(st.booleans(), min_size=1, max_size=9))
def test_every_form_of_payload_makes_the_same_model_after_any_missed_rounds(
    variant: Variant, takes_part: list[bool]
) -> None:
    """Whole, changed, summaries or the smallest: to the bit, for a client that is sent some of the rounds.

    And for a process that serves many, of which each has another version, none later than the last that it was sent.
    """
    server = server_of(variant)
    clients = {form: Receiver(make_protocol(variant)) for form in (*FORMS, "smallest")}
    process = Receiver(make_protocol(variant))
    for present in takes_part:
        play(server)
        for form, client in clients.items() if present else ():
            server.protocol.options = server.protocol.options.model_copy(update={"form": form})
            server.history._bodies.clear()
            indices = np.zeros(STEPS, np.int64) if server.protocol.sends_directions else None
            payload = server.history.payload(client.model.version, indices)
            sizes = server.history.sizes(client.model.version)
            body = len(payload) - MODEL_BYTES - (0 if indices is None else 2 * STEPS)
            assert body == sizes[read_model(payload)[0].form]
            if form == "smallest":
                assert body == min(sizes.values())
            elif FORMS.index(form) in sizes:
                assert read_model(payload)[0].form == FORMS.index(form)
            client.receive(payload)
            assert equal(client.model, server.model)
            if not server.protocol.table.grows:
                kept = sum(map(len, server.history.summaries))
                assert kept <= server.protocol.coefficients.size(40), "what would never be sent is not kept"
            before = process.model
            for base in reversed(range(before.version + 1)):
                process.model = before
                process.receive(server.history.payload(base, indices))
                assert equal(process.model, server.model)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(VARIANTS), st.sampled_from(FORMS), st.data())
def test_a_damaged_model_is_never_used(variant: Variant, form: str, data: st.DataObject) -> None:
    server = server_of(variant, form=form)
    play(server)
    server.sample()
    places = server.protocol.directions(1, 0) if server.protocol.sends_directions else None
    payload, client = server.history.payload(0, places), Receiver(make_protocol(variant))
    for place in range(len(payload)):
        change = data.draw(st.integers(1, 255)) if place % 7 == 0 else 1 << place % 8
        for damaged in (payload[:place], payload[:place] + bytes([payload[place] ^ change]) + payload[place + 1 :]):
            with pytest.raises(PayloadError, match="^expected "):
                client.receive(damaged)
    client.receive(payload)
    assert equal(client.model, server.model)


def sealed(form: int, body: bytes, version: int = 1, base: int = 0) -> bytes:
    return write_model(ModelHeader(version, base, form), body, b"some digest")


@pytest.mark.parametrize(
    ("variant", "payload", "message"),
    [
        (0, b"12", "expected at least 16 bytes; got 2"),
        (
            0,
            sealed(3, b""),
            r"expected a form of \[0, 1, 2\] and at most version 12; got ModelHeader\(version=1, base=0",
        ),
        (3, sealed(0, b""), r"expected a form of \[2\] and at most version 12"),
        (0, sealed(0, b"", 13), "expected a form of .* at most version 12; got"),
        (0, sealed(2, b"", 1, 2), "expected a form of .* at most version 12; got"),
        (0, sealed(2, b"", 2, 1), "expected a model made of a version that is here; got one made of version 1"),
        (0, sealed(0, b"1234"), "expected 160 bytes of coefficients; got 4"),
        (0, sealed(0, b"1" * 161), "expected no more bytes; got 1"),
        (0, sealed(1, b"\x28\0" + b"1234"), "expected indices below 40; got 40"),
        (0, sealed(1, b"12345"), "expected no more bytes; got 5"),
        (0, sealed(2, b"\1"), "expected 2 bytes of a count of clients; got 1"),
        (0, sealed(2, b"\xff\xff"), "expected 3145680 bytes of reports; got 0"),
        (3, sealed(2, b"\1\0"), "expected 10 bytes of a mean; got 0"),
        (6, sealed(2, b"\1\0\7"), "expected votes that begin with 0 or 1; got 7"),
        (2, sealed(2, b"\x28\0"), "expected 20 bytes of indices in the pool; got 2"),
        (
            0,
            sealed(2, b"\0\0"),
            "expected the seal of these coefficients; the payload is damaged, or was made of others",
        ),
    ],
)
def test_a_malformed_model_is_refused_by_name(variant: int, payload: bytes, message: str) -> None:
    with pytest.raises(PayloadError, match=f"^{message}"):
        Receiver(make_protocol(VARIANTS[variant])).receive(payload)


@pytest.mark.parametrize(
    ("variant", "missed", "down", "up"),
    [
        (("fedkseed", {"up": "float32", "down": "float32", "form": "whole"}), 1, 16 + 4 * 4096, 20 + 800),
        (("fedkseed", {"form": "whole"}), 1, 16 + 2 + 2 * 4096, 20 + 200),
        (("fedkseed", {}), 1, 16 + 2 + 10 * 208, 20 + 200),
        (("common-seeds", {"down": "float16"}), 1, 16 + 2 + 400, 20 + 200),
        (("common-seeds", {}), 1, 16 + 2 + 200, 20 + 200),
        (("common-seeds", {}), 10, 16 + 10 * 202, 20 + 200),
        (("sign", {}), 10, 16 + 10 * (2 + 1 + 25), 20 + 25),
    ],
)
def test_payloads_are_as_small_as_the_table_of_the_readme_says(
    variant: Variant, missed: int, down: int, up: int
) -> None:
    """K = 4096, 200 steps, 10 clients heard; votes of 9, which are never even."""
    heard = 9 if variant[0] == "sign" else 10
    server = server_of(variant, clients=heard, per_round=heard, local_steps=200)
    for _ in range(missed):
        server.sample()
        for client in range(heard):
            server.ask(client)
            server.hear(client, report_of(server, client, random_scalars(client, 200)))
        server.aggregate()
    assert len(server.history.payload(0)) == down
    assert len(report_of(server, 0, random_scalars(0, 200))) == up
    if "form" not in variant[1]:
        assert payload_bytes(server.protocol, heard, missed) == (down, up)


def test_a_client_of_another_past_is_sent_all_of_the_model() -> None:
    """As after a server has gone back to an older state, and heard others since."""
    for variant in VARIANTS:
        server, past = server_of(variant), server_of(variant)
        for _ in range(2):
            play(server)
            play(past, without=range(5))
        client = Receiver(make_protocol(variant))
        client.model = past.model
        indices = np.arange(STEPS) if server.protocol.sends_directions else None
        client.receive(server.history.payload(0, indices))
        assert equal(client.model, server.model)
        play(server)
        client.model = past.model
        payload = server.history.payload(2, indices)
        if read_model(payload)[0].form == FORMS.index("summaries"):
            with pytest.raises(PayloadError, match="expected the seal of these coefficients"):
                client.receive(payload)
        client.receive(server.history.payload(0, indices))
        assert equal(client.model, server.model)
