"""The server: what it asks, hears, refuses and saves. Reports are drawn, not trained."""

import dataclasses
import re
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.global_model import RoundRates
from federated.options import ReportLimits
from federated.round_log import RoundLog, replay
from federated.server import Server
from federated.testing import (
    BASE,
    STEPS,
    VARIANTS,
    Variant,
    equal,
    make_protocol,
    play,
    random_scalars,
    report_of,
    server_of,
)
from federated.wire import REPORT_BYTES, ReportHeader, write_lost, write_report
from raytrain.errors import CheckpointError, RecipeError


@settings(max_examples=40)
@given(
    st.sampled_from(VARIANTS),
    st.permutations(range(4)),
    st.permutations(range(4)),
    st.sets(st.integers(0, 8), max_size=3),
)
def test_the_model_does_not_depend_on_the_order_of_arrival(
    variant: Variant, one: list[int], other: list[int], deaf: set[int]
) -> None:
    first, second = server_of(variant), server_of(variant)
    for _ in range(3):
        play(first, one, deaf)
        play(second, other, deaf)
        assert equal(first.model, second.model)
        assert np.array_equal(first.versions, second.versions)
        assert first.history.summaries == second.history.summaries, "what clients add up has an order too"
        learned = (server.protocol.state() for server in (first, second))
        assert all(np.array_equal(*pair) for pair in zip(*(state.values() for state in learned), strict=True))


def test_rounds_end_with_a_quorum_or_move_nothing() -> None:
    server = server_of(VARIANTS[0], quorum=3)
    before = server.model
    play(server, without=set(range(9)) - {*server.sample().clients[:2]})
    assert server.model.version == 1
    assert np.array_equal(server.model.coefficients, before.coefficients)
    play(server)
    assert not np.array_equal(server.model.coefficients, before.coefficients)


BAD_REPORTS = [
    (lambda s, c: report_of(s, c, random_scalars(0, 9)), "expected 10 numbers; got 9"),
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
    numbers = server.protocol.encoding.write(random_scalars(0))
    return write_report(dataclasses.replace(header, **changes), numbers, client, key or server.model.digest)


@pytest.mark.parametrize(("bad", "message"), BAD_REPORTS)
def test_a_report_that_is_not_as_it_must_be_is_refused_and_named(bad: Any, message: str) -> None:
    server = server_of(VARIANTS[0], limits=ReportLimits(examples=50))
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
@given(st.sampled_from(VARIANTS), st.data())
def test_a_damaged_report_is_never_used(variant: Variant, data: st.DataObject) -> None:
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


@settings(max_examples=25)
@given(st.sampled_from(VARIANTS), st.integers(1, 4))
def test_a_state_that_is_saved_goes_on_as_if_nothing_had_happened(variant: Variant, rounds: int) -> None:
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


def test_a_run_is_repeated_from_its_log(tmp_path: Path) -> None:
    for variant in VARIANTS:
        server, log = server_of(variant), tmp_path / "reports.bin"
        with RoundLog(log, server.about(), server.protocol, 0) as rounds:
            for number in range(3):
                rounds.append(number, play(server, without=[3]).used)
        whole = log.read_bytes()
        with log.open("ab") as file:
            file.write(b"\3\0\0\0\4\0half of")
        assert equal(replay(log, make_protocol(variant), BASE), server.model)
        with RoundLog(log, server.about(), server.protocol, 3):
            assert log.read_bytes() == whole
        with RoundLog(log, server.about(), server.protocol, 2):
            assert len(log.read_bytes()) < len(whole)
        with pytest.raises(
            CheckpointError, match=r"reports.bin: expected 3 rounds: expected 6 bytes of round 2; got 0"
        ):
            RoundLog(log, server.about(), server.protocol, 3)
    for content in (b"", b"another file", b'raytrain federated rounds 1\n{"cut'):
        log.write_bytes(content)
        with pytest.raises(CheckpointError, match="expected the log of this run; it is not there, or is another's"):
            RoundLog(log, server.about(), server.protocol, 1)
        with pytest.raises(CheckpointError, match="expected a log of rounds, as a federated run writes"):
            replay(log, server.protocol, BASE)


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
    server.check_origin(3, make_protocol(VARIANTS[0]).initial(BASE).origin)
    client = server.sample().clients[0]
    server.ask(client)
    for base, changes in (("another", {}), (BASE, {"batch": 9}), (BASE, {"rounds": 13})):
        strange = make_protocol(VARIANTS[0], **changes).initial(base)
        with pytest.raises(
            RecipeError, match=rf"^client 3: expected first weights, directions .*; got '{strange.origin[:12]}"
        ):
            server.check_origin(3, strange.origin)
        header = ReportHeader(0, 0, STEPS, 3)
        report = write_report(header, server.protocol.encoding.write(random_scalars(0)), client, strange.digest)
        assert server.hear(client, report) == "refused"


def test_a_run_has_its_rounds_and_no_more() -> None:
    server = server_of(VARIANTS[0], rounds=1)
    play(server)
    with pytest.raises(RuntimeError, match="^all 1 rounds are done$"):
        server.sample()
    with pytest.raises(ValueError, match=r"^weight_decay: expected below 1 / lr = 2; got 3$"):
        RoundRates.of([0.5, 0.1], 3.0)
