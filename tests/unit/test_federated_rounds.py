"""Rounds without models: payloads, what the server adds up, and what it refuses. Reports are drawn, not trained."""

import dataclasses
import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.broadcast import FORMS, payload_bytes, receive
from federated.encodings import Floats, PayloadError
from federated.global_model import GlobalModel, RoundRates
from federated.protocols.protocol import PROTOCOLS, Protocol, Report
from federated.recipe import options_of_protocol
from federated.round_log import RoundLog, replay
from federated.server import CommunicationRound, Participation, ReportLimits, Server
from federated.wire import (
    MODEL_BYTES,
    REPORT_BYTES,
    ModelHeader,
    ReportHeader,
    read_model,
    write_lost,
    write_model,
    write_report,
)
from raytrain.errors import CheckpointError, RecipeError
from raytrain.names import resolve

BASE = "digest of w0"
VARIANTS = [
    ("fedkseed", {"pool": 40, "up": "float32", "down": "float32"}),
    ("fedkseed", {"pool": 40, "up": "one-byte", "down": "float16", "weight_decay": 0.5}),
    ("fedkseed-pro", {"pool": 40, "up": "float16", "down": "float16"}),
    ("common-seeds", {"pool": 0, "up": "one-byte", "down": "one-byte", "weight_decay": 0.5}),
    ("common-seeds", {"pool": 40, "up": "float32", "down": "float32", "local": True}),
    ("common-seeds", {"pool": 40, "weighting": "equal"}),
    ("sign", {"pool": 0}),
    ("sign", {"pool": 40, "local": True}),
]
STEPS = 10
variants = st.sampled_from(VARIANTS)


def protocol_of(variant: tuple[str, dict[str, Any]], rounds: int = 12, **more: Any) -> Protocol:
    name, options = variant
    factory = resolve(PROTOCOLS, name, "protocol.name")
    made = options_of_protocol(factory)(name=name, **{"local_steps": STEPS, **options, **more})
    rates = RoundRates.of([0.01 / (1 + number) for number in range(rounds)], made.weight_decay)
    protocol: Protocol = factory(made, rates, 11)
    return protocol


def server_of(variant: tuple[str, dict[str, Any]], clients: int = 9, per_round: int = 4, **more: Any) -> Server:
    quorum = more.pop("quorum", 1)
    return Server(
        protocol_of(variant, **more), BASE, Participation(clients, per_round, quorum), ReportLimits(examples=50)
    )


def drawn(seed: int, count: int = STEPS) -> Floats:
    """Some projected gradients, of which a few are not used."""
    generator = np.random.default_rng(seed)
    numbers = generator.normal(size=count).astype(np.float32) * 5
    return np.where(generator.random(count) < 0.1, np.float32("nan"), numbers)


def report_of(server: Server, client: int, numbers: Floats | None = None, examples: int | None = None) -> bytes:
    protocol, model = server.protocol, server.model
    numbers = drawn(1000 * model.version + client) if numbers is None else numbers
    header = ReportHeader(model.version, model.version, len(numbers), 1 + client % 40 if examples is None else examples)
    return write_report(header, protocol.encoding.write(numbers), client, model.digest)


def play(server: Server, order: Sequence[int] | None = None, deaf: frozenset[int] = frozenset()) -> CommunicationRound:
    """Play a round with drawn reports, which arrive in some order."""
    clients = [client for client in server.sample().clients if client not in deaf]
    for client in clients:
        server.ask(client)
    for place in order or range(len(clients)):
        client = clients[place % len(clients)]
        if client not in server.round.heard:
            assert server.hear(client, report_of(server, client)) == "heard"
    return server.aggregate()


class Client:
    """The part of a client that makes models of payloads, and remembers the last one."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.model = self.initial = protocol.initial(BASE)

    def take(self, payload: bytes) -> None:
        self.model, _ = receive(payload, self.protocol, self.model, self.initial)


def equal(one: GlobalModel, other: GlobalModel) -> bool:
    return one.digest == other.digest and one.coefficients.tobytes() == other.coefficients.tobytes()


@settings(max_examples=60)
@given(variants, st.lists(st.booleans(), min_size=1, max_size=9))
def test_every_form_of_payload_makes_the_same_model_after_any_missed_rounds(
    variant: tuple[str, dict[str, Any]], takes_part: list[bool]
) -> None:
    """Whole, changed, summaries or the smallest: to the bit, for a client that is sent some of the rounds.

    And for a process that serves many, of which each has another version, none later than the last that it was sent.
    """
    server = server_of(variant)
    clients = {form: Client(protocol_of(variant)) for form in (*FORMS, "smallest")}
    process = Client(protocol_of(variant))
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
            client.take(payload)
            assert equal(client.model, server.model)
            before = process.model
            for base in reversed(range(before.version + 1)):
                process.model = before
                process.take(server.history.payload(base, indices))
                assert equal(process.model, server.model)


@settings(max_examples=40)
@given(variants, st.permutations(range(4)), st.permutations(range(4)), st.sets(st.integers(0, 8), max_size=3))
def test_the_model_does_not_depend_on_the_order_of_arrival(
    variant: tuple[str, dict[str, Any]], one: list[int], other: list[int], deaf: set[int]
) -> None:
    first, second = server_of(variant), server_of(variant)
    for _ in range(3):
        play(first, one, frozenset(deaf))
        play(second, other, frozenset(deaf))
        assert equal(first.model, second.model)
        assert np.array_equal(first.versions, second.versions)
        assert first.history.summaries == second.history.summaries, "what clients add up has an order too"
        learned = (server.protocol.state() for server in (first, second))
        assert all(np.array_equal(*pair) for pair in zip(*(state.values() for state in learned), strict=True))


def test_the_sum_is_that_of_the_paper() -> None:
    """A_k = A_k - lr sum of c_i q_it, and towards w0 by weight decay, against a loop over everything."""
    variant = ("fedkseed", {"pool": 7, "up": "float32", "down": "float32", "weight_decay": 3.0})
    server, sums = server_of(variant), np.zeros(7)
    for number in range(5):
        lr = float(server.protocol.rates.lr[number])
        clients = server.sample().clients
        total = sum(1 + client for client in clients)
        sums *= 1 - lr * 3.0
        for client in clients:
            server.ask(client)
            server.hear(client, report_of(server, client))
            numbers = drawn(1000 * number + client)
            for place, value in zip(server.protocol.directions(number, client), numbers, strict=True):
                sums[place] -= lr * (1 + client) / total * float(np.nan_to_num(value))
        server.aggregate()
        seeds, found = server.protocol.seeds_and_coefficients(server.model)
        pool = server.protocol.table.seeds(np.arange(7)).tolist()
        np.testing.assert_allclose(found, [sums[pool.index(seed)] for seed in seeds.tolist()], rtol=1e-6)


def test_a_vote_moves_by_its_sign_and_an_even_one_not_at_all() -> None:
    server = server_of(("sign", {"pool": 0, "local": True}), clients=4)
    votes = np.array([[1, 1, 1, -1], [1, -1, -1, -1], [1, 1, -1, -1], [1, -1, -1, -1]], np.float32)
    for clients, expected in (([0, 1, 2, 3], [1, 0, -1, -1]), ([0, 1, 2], [1, 1, -1, -1])):
        server = server_of(("sign", {"pool": 0, "local": True}), clients=4, local_steps=4)
        server.sample()
        for client in clients:
            server.ask(client)
            server.hear(client, report_of(server, client, votes[client]))
        server.aggregate()
        lr = float(server.protocol.rates.lr[0])
        assert server.model.coefficients.tolist() == [-lr * value for value in expected]
        assert len(server.history.payload(0)) == MODEL_BYTES + 2 + server.protocol.summary_bytes(len(clients))


def test_important_seeds_are_drawn_more_often_but_not_by_more_than_e() -> None:
    protocol = protocol_of(("fedkseed-pro", {"pool": 4}), local_steps=2000)
    assert protocol.probabilities().tolist() == [0.25] * 4  # type: ignore[attr-defined]
    numbers = np.array([np.nan, 1e9, -3.0, 3.0], np.float32)
    protocol.observe([Report(0, 1, numbers, np.arange(4)), Report(1, 1, np.float32([1.0]), np.array([3]))])
    means = np.array([0.0, 500.0, 1.5, 4 / 3])  # over an initial 0 each; 1e9 counts as 1000
    likely = np.exp(means / 500) / np.exp(means / 500).sum()
    np.testing.assert_allclose(protocol.probabilities(), likely, rtol=1e-6)  # type: ignore[attr-defined]
    counts = np.bincount(protocol.directions(3, 5), minlength=4) / 2000
    np.testing.assert_allclose(counts, likely, atol=0.05)
    again = protocol_of(("fedkseed-pro", {"pool": 4}), local_steps=2000)
    again.load_state(protocol.state())
    assert np.array_equal(again.directions(3, 5), protocol.directions(3, 5))
    assert not np.array_equal(again.directions(3, 6), protocol.directions(3, 5))


def test_rounds_end_with_a_quorum_or_move_nothing() -> None:
    server = server_of(VARIANTS[0], quorum=3)
    before = server.model
    play(server, deaf=frozenset(set(range(9)) - {*server.sample().clients[:2]}))
    assert server.model.version == 1
    assert np.array_equal(server.model.coefficients, before.coefficients)
    play(server)
    assert not np.array_equal(server.model.coefficients, before.coefficients)


BAD_REPORTS = [
    (lambda s, c: report_of(s, c, drawn(0, 9)), "expected 10 numbers; got 9"),
    (lambda s, c: report_of(s, c)[:-2], f"expected {REPORT_BYTES + 40} bytes; got {REPORT_BYTES + 38}"),
    (lambda s, c: b"", f"expected {REPORT_BYTES + 40} bytes; got 0"),
    (lambda s, c: b"x" * 10**6, "expected 10 numbers; got 249995"),
    (lambda s, c: report_of(s, c, examples=0), "expected 1 to 50 examples; got 0"),
    (lambda s, c: report_of(s, c, examples=10**9), "expected 1 to 50 examples; got 1000000000"),
    (lambda s, c: report_of(s, c, np.full(10, 2e6, np.float32)), r"expected numbers up to 1e\+06; got 2e\+06"),
    (lambda s, c: other(s, c, version=7), "expected version 0; got 7"),
    (lambda s, c: other(s, c, round=7), "expected round 0; got 7"),
    (lambda s, c: other(s, c, count=7), "expected count 10; got 7"),
    (
        lambda s, c: report_of(s, c + 1),
        "expected the seal of this client and these coefficients; the report is damaged",
    ),
    (lambda s, c: other(s, c, key=b"others"), "expected the seal of this client and these coefficients; the report is"),
    (lambda s, c: write_lost(3, 0, c), "expected 10 numbers; got 0"),
]


def other(server: Server, client: int, key: bytes = b"", **changes: int) -> bytes:
    header = ReportHeader(0, 0, STEPS, 3)
    numbers = server.protocol.encoding.write(drawn(0))
    return write_report(dataclasses.replace(header, **changes), numbers, client, key or server.model.digest)


@pytest.mark.parametrize(("bad", "message"), BAD_REPORTS)
def test_a_report_that_is_not_as_it_must_be_is_refused_and_named(bad: Any, message: str) -> None:
    server = server_of(VARIANTS[0])
    client = server.sample().clients[1]
    server.ask(client)
    assert server.hear(client, bad(server, client)) == "refused"
    assert re.match(f"client {client}, round 0: {message}", server.round.refusals[0])
    assert server.hear(client, report_of(server, client)) == "heard", "the next one may be right"
    assert server.aggregate().refused == 1


def test_a_report_that_nobody_asked_for_is_refused() -> None:
    server = server_of(VARIANTS[0])
    with pytest.raises(RuntimeError, match="no round is going on"):
        server.hear(1, b"")
    inside, another, *_ = server.sample().clients
    outside = next(client for client in range(9) if client not in server.round.clients)
    for client in (inside, outside, 10**9):
        assert server.hear(client, report_of(server, client, examples=3)) == "refused"
    server.ask(inside)
    assert server.hear(inside, report_of(server, inside)) == "heard"
    assert server.hear(inside, report_of(server, inside)) == "refused"
    assert server.hear(inside, write_lost(0, 0, inside)) == "refused"
    assert [text.partition(": ")[2] for text in server.round.refusals[2:4]] == [
        "expected a client that was asked; this one was not",
        "expected one report; got another one",
    ]
    with pytest.raises(ValueError, match=f"client: expected one of round 0; got {outside}"):
        server.ask(outside)
    with pytest.raises(RuntimeError, match=r"a round is going on; call aggregate\(\) first"):
        server.save(Path("nowhere"))
    old = report_of(server, another)
    server.aggregate()
    server.sample()
    for client in server.round.clients:
        server.ask(client)
        assert server.hear(client, old) == "refused"
    for _ in range(1000):
        server.hear(inside, b"x")
    assert (server.round.refused, len(server.round.refusals)) == (1000 + len(server.round.clients), 20)


@settings(max_examples=20)
@given(variants, st.data())
def test_a_damaged_report_is_never_used(variant: tuple[str, dict[str, Any]], data: st.DataObject) -> None:
    """Each cut and each byte: dropped and named, never an error, never another client's number."""
    server = server_of(variant)
    client = server.sample().clients[0]
    server.ask(client)
    whole = report_of(server, client)
    for place in range(len(whole)):
        change = data.draw(st.integers(1, 255)) if place % 7 == 0 else 1 << place % 8
        changed = whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :]
        for damaged in (whole[:place], changed):
            assert server.hear(client, damaged) == "refused"
    assert server.hear(client, whole) == "heard"


@settings(max_examples=15, deadline=None)
@given(variants, st.sampled_from(FORMS), st.data())
def test_a_damaged_model_is_never_used(variant: tuple[str, dict[str, Any]], form: str, data: st.DataObject) -> None:
    server = server_of(variant, form=form)
    play(server)
    server.sample()
    places = server.protocol.directions(1, 0) if server.protocol.sends_directions else None
    payload, client = server.history.payload(0, places), Client(protocol_of(variant))
    for place in range(len(payload)):
        change = data.draw(st.integers(1, 255)) if place % 7 == 0 else 1 << place % 8
        for damaged in (payload[:place], payload[:place] + bytes([payload[place] ^ change]) + payload[place + 1 :]):
            with pytest.raises(PayloadError, match="^expected "):
                client.take(damaged)
    client.take(payload)
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
        Client(protocol_of(VARIANTS[variant])).take(payload)


@settings(max_examples=25)
@given(variants, st.integers(1, 4))
def test_a_state_that_is_saved_goes_on_as_if_nothing_had_happened(
    variant: tuple[str, dict[str, Any]], rounds: int
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        straight = server_of(variant)
        for _ in range(rounds):
            play(straight)
            straight.save(folder)
        resumed = server_of(variant)
        assert resumed.resume(folder)
        for _ in range(2):
            play(straight)
            play(resumed)
            assert equal(straight.model, resumed.model)
            assert np.array_equal(straight.versions, resumed.versions)
            for base in range(straight.model.version):
                places = np.arange(STEPS) if straight.protocol.sends_directions else None
                assert straight.history.payload(base, places) == resumed.history.payload(base, places)


def test_states_are_complete_or_absent_and_the_two_newest_are_kept(tmp_path: Path) -> None:
    server = server_of(VARIANTS[1])
    assert not server.resume(tmp_path)
    for _ in range(4):
        play(server)
        server.save(tmp_path)
    first, second = sorted(tmp_path.iterdir())
    assert [first.name, second.name] == ["round-00000003.state", "round-00000004.state"]
    leftover = tmp_path / ".round-00000005.state.0123.tmp"
    leftover.write_bytes(b"half of a st")
    content = second.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b"", content[:40]):
        second.write_bytes(damaged)
        resumed = server_of(VARIANTS[1])
        assert resumed.resume(tmp_path)
        assert resumed.model.version == 3
        assert not leftover.exists()
    first.write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"^no state of this run can be read:\n.*4.state: expected the content that"
    ):
        server_of(VARIANTS[1]).resume(tmp_path)
    (tmp_path / "file").write_text("")
    play(server)
    with pytest.raises(CheckpointError, match="file: the state after round 5 cannot be written"):
        server.save(tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_steps": 11}, "expected a run with protocol = .*local_steps.:11"),
        (
            {"clients": 10},
            r"expected a run with participation = Participation\(clients=10, .* begin another run, or keep",
        ),
        ({"rounds": 13}, "expected a run with rates = "),
    ],
)
def test_a_state_of_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    server = server_of(VARIANTS[0])
    play(server)
    server.save(tmp_path)
    with pytest.raises(RecipeError, match=message):
        server_of(VARIANTS[0], **changes).resume(tmp_path)


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
    variant: tuple[str, dict[str, Any]], missed: int, down: int, up: int
) -> None:
    """K = 4096, 200 steps, 10 clients heard; votes of 9, which are never even."""
    heard = 9 if variant[0] == "sign" else 10
    server = server_of(variant, clients=heard, per_round=heard, local_steps=200)
    for _ in range(missed):
        server.sample()
        for client in range(heard):
            server.ask(client)
            server.hear(client, report_of(server, client, drawn(client, 200)))
        server.aggregate()
    assert len(server.history.payload(0)) == down
    assert len(report_of(server, 0, drawn(0, 200))) == up
    if "form" not in variant[1]:
        assert payload_bytes(server.protocol, heard, missed) == (down, up)


def test_a_run_is_repeated_from_its_log(tmp_path: Path) -> None:
    for variant in VARIANTS:
        server, log = server_of(variant), tmp_path / "reports.bin"
        with RoundLog(log, server.about(), server.protocol, 0) as rounds:
            for number in range(3):
                rounds.append(number, play(server, deaf=frozenset({3})).used)
        whole = log.read_bytes()
        with log.open("ab") as file:
            file.write(b"\3\0\0\0\4\0half of")
        assert equal(replay(log, protocol_of(variant), BASE), server.model)
        with RoundLog(log, server.about(), server.protocol, 3):
            assert log.read_bytes() == whole
        with RoundLog(log, server.about(), server.protocol, 2):
            assert len(log.read_bytes()) < len(whole)
        with pytest.raises(
            CheckpointError, match=r"reports.bin: expected 3 rounds: expected 6 bytes of round 2; got 0"
        ):
            RoundLog(log, server.about(), server.protocol, 3)
    for content in (b"", b"another file"):
        log.write_bytes(content)
        with pytest.raises(CheckpointError, match="expected the log of this run; it is not there, or is another's"):
            RoundLog(log, server.about(), server.protocol, 1)
        with pytest.raises(CheckpointError, match="expected a log of rounds, as a federated run writes"):
            replay(log, server.protocol, BASE)


def test_a_client_of_another_past_is_sent_all_of_the_model() -> None:
    """As after a server has gone back to an older state, and heard others since."""
    for variant in VARIANTS:
        server, past = server_of(variant), server_of(variant)
        for _ in range(2):
            play(server)
            play(past, deaf=frozenset(range(5)))
        client = Client(protocol_of(variant))
        client.model = past.model
        indices = np.arange(STEPS) if server.protocol.sends_directions else None
        client.take(server.history.payload(0, indices))
        assert equal(client.model, server.model)
        play(server)
        client.model = past.model
        payload = server.history.payload(2, indices)
        if read_model(payload)[0].form == FORMS.index("summaries"):
            with pytest.raises(PayloadError, match="expected the seal of these coefficients"):
                client.take(payload)
        client.take(server.history.payload(0, indices))
        assert equal(client.model, server.model)


def test_a_million_idle_clients_cost_four_bytes_each() -> None:
    tracemalloc.start()
    server = server_of(VARIANTS[1], clients=1_000_000, per_round=20, local_steps=10)
    play(server)
    play(server)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 4_000_000 <= used < 4_500_000
    assert (server.versions > 0).sum() in range(19, 21)


def test_a_client_with_another_origin_is_told_and_its_reports_are_refused() -> None:
    server = server_of(VARIANTS[0])
    server.check_origin(3, protocol_of(VARIANTS[0]).initial(BASE).origin)
    client = server.sample().clients[0]
    server.ask(client)
    for base, changes in (("another", {}), (BASE, {"batch": 9}), (BASE, {"rounds": 13})):
        strange = protocol_of(VARIANTS[0], **changes).initial(base)
        with pytest.raises(
            RecipeError, match=rf"^client 3: expected first weights, directions .*; got '{strange.origin[:12]}"
        ):
            server.check_origin(3, strange.origin)
        header = ReportHeader(0, 0, STEPS, 3)
        report = write_report(header, server.protocol.encoding.write(drawn(0)), client, strange.digest)
        assert server.hear(client, report) == "refused"


def test_a_run_has_its_rounds_and_no_more() -> None:
    server = server_of(VARIANTS[0], rounds=1)
    play(server)
    with pytest.raises(RuntimeError, match="^all 1 rounds are done$"):
        server.sample()
    with pytest.raises(ValueError, match=r"^weight_decay: expected below 1 / lr = 2; got 3$"):
        RoundRates.of([0.5, 0.1], 3.0)
