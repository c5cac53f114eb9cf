"""The client of a job server, against a small one that answers badly; tests/e2e has a real one."""

import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from raytrain.cli import jobs as verbs
from raytrain.errors import RecipeError, TrainingError
from raytrain.launch.jobs import client, cluster_folder
from raytrain.launch.jobs.client import JobServer, LostError, exposes_token
from raytrain.launch.jobs.cluster_folder import ClusterFolder
from raytrain.launch.jobs.job import Job, JobLog
from raytrain.launch.jobs.storage import CHUNK_BYTES, ChangedError, dump, measured
from raytrain.launch.jobs.transfer import fetch_run
from raytrain.launch.jobs.upload import upload_of

Handler = BaseHTTPRequestHandler
Answer = Callable[[Handler], object]


def say(handler: Handler, status: int, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", "text/plain; charset=utf-8")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def details(status: str = "RUNNING", **changes: Any) -> bytes:
    about = {"raytrain_words": "train digits", "raytrain_run": "/run"}
    raw = {"type": "SUBMISSION", "submission_id": "x-1", "entrypoint": "", "metadata": about, "status": status}
    return json.dumps({**raw, **changes}).encode()


class Dashboard:
    """A server that answers a path as it is told to; the last of several answers stays."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[str] = []
        self.set("GET /api/version", (200, json.dumps({"version": "4", "ray_version": ray.__version__}).encode()))

        def answer(handler: Handler) -> None:
            self._answer(handler)

        methods = dict.fromkeys(("do_GET", "do_POST", "do_DELETE"), answer)
        told = type("Told", (Handler,), {**methods, "log_message": lambda *_: None})
        self.web = ThreadingHTTPServer(("127.0.0.1", 0), told)
        self.web.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.web.server_port}"

    def set(self, asked: str, *answers: tuple[int, bytes] | Answer) -> None:
        self.answers[asked] = [
            answer if callable(answer) else (lambda handler, it=answer: say(handler, *it)) for answer in answers
        ]

    def _answer(self, handler: Handler) -> None:
        handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        asked = f"{handler.command} {handler.path.partition('?')[0]}"
        self.asked.append(asked)
        if asked.startswith(("GET /api/jobs/fetch-", "DELETE /api/jobs/fetch-", "POST /api/jobs/fetch-")):
            asked = f"{handler.command} listing"
        answers = self.answers.get(asked, [lambda handler: say(handler, 404, b"no such thing")])
        (answers.pop(0) if len(answers) > 1 else answers[0])(handler)


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    yield from started(Dashboard())


def started(dashboard: Dashboard) -> Iterator[Dashboard]:
    thread = threading.Thread(target=dashboard.web.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield dashboard
    dashboard.web.shutdown()
    dashboard.web.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(client, "SILENCE_SECONDS", 0.05)
    monkeypatch.setattr(client, "RECONNECT_SECONDS", 0.5)
    monkeypatch.setattr(cluster_folder, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(cluster_folder, "TROUBLE_SECONDS", 0.3)


JOB = "GET /api/jobs/x-1"


def test_a_job_whose_log_cannot_be_read_is_followed_to_its_end(dashboard: Dashboard) -> None:
    """As behind a proxy without WebSockets."""
    said: list[str] = []
    dashboard.set(JOB, *[(200, details())] * 8, (200, details("FAILED", driver_exit_code=3)))
    job = JobServer(dashboard.url).follow("x-1", JobLog(lambda _: None), said.append)
    assert job.exit_status == 3
    assert len(said) == 1
    assert said[0].startswith("the log of x-1 cannot be read from here (404")
    assert "it is job-driver-x-1.log among Ray's logs on the machine that runs the job" in said[0]


def test_a_job_that_has_ended_ends_it_too(dashboard: Dashboard) -> None:
    dashboard.set(JOB, (200, details("SUCCEEDED")))
    assert JobServer(dashboard.url).follow("x-1", JobLog(lambda _: None), lambda _: None).exit_status == 0


LOG = "step 1\nstep 2\nstep 3\n"
BREAKS = (RuntimeError("closed with 1006"), ConnectionError("cut"), None)


@given(
    st.lists(st.tuples(st.integers(0, len(LOG)), st.sampled_from(BREAKS)), max_size=6), st.integers(0, 6), st.booleans()
)
def test_however_the_log_breaks_off_it_ends_with_the_job(
    connections: list[tuple[int, Exception | None]], polls: int, readable: bool
) -> None:
    """What is shown is the log, and all of it where it can be read long enough."""
    shown: list[str] = []
    said: list[str] = []
    left, polled = iter(connections), iter(range(polls))

    async def tail(name: str) -> AsyncIterator[str]:
        end, broken = next(left, (len(LOG), None) if readable else (0, BREAKS[0]))
        for letter in LOG[:end]:
            yield letter
        if broken:
            raise broken

    server = JobServer.__new__(JobServer)
    server.address = "http://head:8265"
    server.client = SimpleNamespace(tail_job_logs=tail)  # type: ignore[assignment]
    status = Job("x-1", (), "/run")
    over = Job("x-1", (), "/run", status="SUCCEEDED")
    server.job = lambda name: over if next(polled, None) is None else status  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "RETRY_SECONDS", 0.0)
        patch.setattr(client, "SILENCE_SECONDS", 0.001)
        assert server.follow("x-1", JobLog(shown.append), said.append) is over
    assert LOG.startswith("".join(shown))
    assert len(said) <= 1
    if readable and len(connections) < client.LOG_ATTEMPTS and all(broken for _, broken in connections):
        assert "".join(shown) == LOG


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_server_that_fails_for_a_while_is_asked_again(dashboard: Dashboard, status: int) -> None:
    said: list[str] = []
    dashboard.set(JOB, (status, b"Traceback\nit hurts"), (200, details("SUCCEEDED")))
    assert JobServer(dashboard.url).follow("x-1", JobLog(lambda _: None), said.append).exit_status == 0
    lost = f"lost the connection to {dashboard.url} (the job server answered with status {status}: it hurts); trying ag"
    assert said[0].startswith(lost)
    assert len([text for text in said if text.startswith("lost")]) == 1


def test_a_server_that_fails_for_good_does_not_say_that_nothing_was_started(dashboard: Dashboard) -> None:
    dashboard.set(JOB, (500, b"it hurts"))
    server = JobServer(dashboard.url)
    with pytest.raises(
        TrainingError, match=r"^no connection to .* for 0.5 s \(the job server answered with .*it hurts\)"
    ):
        server.follow("x-1", JobLog(lambda _: None), lambda _: None)
    dashboard.set(JOB, (404, b"Job x-1 does not exist"))
    with pytest.raises(
        TrainingError, match=r"^Job x-1 does not exist; raytrain jobs lists those that there are$"
    ) as caught:
        verbs._follow(server, "x-1")
    assert caught.value.exit_status == 1


def test_a_server_that_is_gone_is_named_and_so_is_the_job(dashboard: Dashboard) -> None:
    server = JobServer(dashboard.url)
    dashboard.web.shutdown()
    dashboard.web.server_close()
    gone = rf"^no good answer from {dashboard.url} \(.*refused\)"
    for call in (server.job, server.stop):
        with pytest.raises(
            LostError, match=gone + rf"; raytrain jobs --address {dashboard.url} shows whether x-1 runs$"
        ):
            call("x-1")
    with pytest.raises(LostError, match=gone + "$"):
        server.jobs()


def test_a_job_that_may_have_been_started_is_named(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setitem(client.TIMEOUT_SECONDS, "POST", 0.1)
    monkeypatch.setattr(Dashboard, "_answer", ignoring_packages(Dashboard._answer))
    dashboard.set("POST /api/jobs/", lambda _: ended.wait(10))
    server = JobServer(dashboard.url)
    with pytest.raises(LostError, match=r"timed out\); raytrain jobs --address .* shows whether x-1 runs$"):
        server.submit(Job("x-1", ("train", "digits"), "/run"), upload_of(tmp_path))
    ended.set()


def ignoring_packages(answer: Callable[..., None]) -> Callable[..., None]:
    def answer_otherwise(dashboard: Dashboard, handler: Handler) -> None:
        if handler.path.startswith("/api/packages"):
            say(handler, 200, b"")  # it is there
        else:
            answer(dashboard, handler)

    return answer_otherwise


FILE = "GET /api/v0/logs/file"


def test_a_file_comes_piece_by_piece(dashboard: Dashboard) -> None:
    """The server sends the second half when the first has been taken."""
    taken = threading.Event()
    half = b"x" * CHUNK_BYTES

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(2 * len(half)))
        handler.end_headers()
        handler.wfile.write(half)
        if taken.wait(10):
            handler.wfile.write(half)

    dashboard.set(FILE, answer)
    pieces = ClusterFolder(JobServer(dashboard.url), Job("x-1", (), "/run")).read("model")
    assert next(pieces) == half
    taken.set()
    assert b"".join(pieces) == half


def test_a_file_that_breaks_off_is_explained(dashboard: Dashboard) -> None:
    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "10")
        handler.end_headers()
        handler.wfile.write(b"12345")
        handler.close_connection = True

    dashboard.set(FILE, answer, (500, b"it hurts"))
    run = ClusterFolder(JobServer(dashboard.url), Job("x-1", (), "/run"))
    limit = rf"; Ray's dashboard, {dashboard.url}, gives each file 300 s$"
    with pytest.raises(OSError, match=r"^model broke off \(.*5 more expected.*\)" + limit):
        list(run.read("model"))
    with pytest.raises(ChangedError, match=r"^model: it hurts$"):
        list(run.read("model"))
    dashboard.web.shutdown()
    dashboard.web.server_close()
    with pytest.raises(OSError, match=r"^model broke off \(.*refused\)" + limit):
        list(run.read("model"))


def serve_run(dashboard: Dashboard, *listing: bytes, later: int = 0) -> None:
    """Let the dashboard take the small job that lists a run's files, and go through these states with it.

    Args:
        dashboard: the server.
        listing: the states of the job.
        later: how often its list is not there yet.
    """
    files, unready = {"a": b"1", "b": b"22"}, iter(range(later))

    def answer(handler: Handler) -> None:
        name = handler.path.partition("filename=")[2].partition("&")[0].replace("%2F", "/")
        whole = dump({name: measured([data]) for name, data in files.items()})
        if next(unready, None) is not None and name.endswith("files.json"):
            say(handler, 500, b"A file is not found at: files.json")
        else:
            say(handler, 200, whole if name.endswith("files.json") else files[name.rpartition("/")[2]])

    dashboard.set("POST /api/jobs/", (200, b'{"submission_id": "", "job_id": ""}'))
    dashboard.set("GET listing", *((200, each) for each in listing))
    dashboard.set("POST listing", (200, b'{"stopped": true}'))
    dashboard.set("DELETE listing", (200, b'{"deleted": true}'))
    dashboard.set(FILE, answer)


def test_a_large_run_may_take_long_to_list(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_folder, "START_SECONDS", 0.05)
    serve_run(dashboard, details("PENDING"), *[details("RUNNING")] * 8, details("STOPPED"), later=7)
    fetch_run(ClusterFolder(JobServer(dashboard.url), Job("x-1", (), "/run")), tmp_path / "copy", lambda _: None)
    assert (tmp_path / "copy" / "b").read_bytes() == b"22"
    assert [asked.partition(" ")[0] for asked in dashboard.asked[-3:]] == ["POST", "GET", "DELETE"]  # it is ended


def test_a_server_that_cannot_give_a_file_for_a_while_is_asked_again(dashboard: Dashboard) -> None:
    serve_run(dashboard, details("RUNNING"))
    (given,) = dashboard.answers[FILE]
    trouble = [(500, b"Server got itself in trouble")] * 3
    dashboard.set(FILE, *trouble, given, *trouble, given, *trouble)
    run = ClusterFolder(JobServer(dashboard.url), Job("x-1", (), "/run"))
    assert run.listing().keys() == {"a", "b"}
    assert b"".join(run.read("b")) == b"22"
    assert sum(asked.startswith("POST /api/jobs/") for asked in dashboard.asked) == 1
    with pytest.raises(ChangedError, match=r"^a: Server got itself in trouble$"):
        list(run.read("a"))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            details("PENDING"),
            "x-1: its machine did not start to list the run's files within 0.01 s; it is busy, or gone",
        ),
        (details("FAILED", message="failed:\nraytrain: there is no run in /run"), "x-1: there is no run in /run"),
        (details("STOPPED"), "x-1: its machine cannot list the run's files: stopped"),
    ],
)
def test_why_a_run_cannot_be_listed_is_said(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, state: bytes, message: str
) -> None:
    monkeypatch.setattr(cluster_folder, "START_SECONDS", 0.01)
    serve_run(dashboard, state)
    with pytest.raises(RecipeError) as caught:
        ClusterFolder(JobServer(dashboard.url), Job("x-1", (), "/run")).listing()
    assert str(caught.value).startswith(message)


def test_a_fetch_that_loses_its_server_says_that_what_came_is_kept(dashboard: Dashboard, tmp_path: Path) -> None:
    serve_run(dashboard, details("RUNNING"), details("RUNNING"), details("STOPPED"))
    run = ClusterFolder(JobServer(dashboard.url), Job("x-1", (), "/run"))
    files = dashboard.answers[FILE]

    def gone(handler: Handler) -> None:
        dashboard.set("POST /api/jobs/", (503, b"gone"))
        say(handler, 503, b"gone")

    dashboard.set(FILE, files[0], files[0], gone)
    with pytest.raises(
        TrainingError, match=rf"^no good answer from {dashboard.url} \(.*\); what has come is kept in .*cop"
    ):
        fetch_run(run, tmp_path / "copy", lambda _: None)
    assert (tmp_path / ".copy.partial" / "a").read_bytes() == b"1"


def test_a_run_whose_store_cannot_be_used_here_comes_from_the_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    server = JobServer.__new__(JobServer)
    server.address = "http://head:8265"
    server.job = lambda name: Job(name, (), "/no/where/x-1", "s3://bucket/x-1")  # type: ignore[method-assign]
    assert isinstance(verbs._left_by(server, "x-1"), ClusterFolder)
    said = capsys.readouterr().err
    assert "s3://bucket/x-1 cannot be used: ImportError: Install s3fs" in said
    assert said.rstrip().endswith("; looking on the cluster instead")


def redirect(place: str) -> Answer:
    def answer(handler: Handler) -> None:
        handler.send_response(307)
        handler.send_header("Location", place)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


@pytest.fixture
def impostor() -> Iterator[Dashboard]:
    """Another server, which answers all as the true one would."""
    yield from started(Dashboard())


def test_no_other_server_is_believed_in_its_place(dashboard: Dashboard, impostor: Dashboard, tmp_path: Path) -> None:
    server = JobServer(dashboard.url)
    log = "GET /api/jobs/x-1/logs/tail"
    for asked in (JOB, "GET /api/jobs/", FILE, log):
        dashboard.set(asked, redirect(f"{impostor.url}{asked.partition(' ')[2]}"))
    refused = rf"^--address: {dashboard.url} sends on to '{impostor.url}.*', where raytrain does not follow; name that "
    folder = ClusterFolder(server, Job("x-1", (), "/run"))
    for call in (lambda: server.job("x-1"), server.jobs, lambda: list(folder.read("model"))):
        with pytest.raises(RecipeError, match=refused):
            call()
    said: list[str] = []
    dashboard.set(JOB, (200, details()), (200, details()), (200, details()), (200, details("SUCCEEDED")))
    server.follow("x-1", JobLog(lambda _: None), said.append)
    assert f"(the log is sent on to '{impostor.url}" in said[0]
    dashboard.set("GET /api/version", redirect(f"{impostor.url}/api/version"))
    with pytest.raises(RecipeError, match=refused):
        JobServer(dashboard.url)
    assert impostor.asked == []


OURS = {"raytrain_words": "train digits", "raytrain_run": "/run"}


@pytest.mark.parametrize(
    "odd",
    [
        {"metadata": {**OURS, "raytrain_words": "train 'digits"}},
        {"metadata": {**OURS, "raytrain_words": []}},
        {"submission_id": "../version"},
        {"submission_id": ".."},
        {"submission_id": "x#y"},
        {"start_time": 10**18},
        {"start_time": -5},
        {"status": "ASLEEP"},
        {"driver_exit_code": "x"},
        "no job",
        None,
        [],
    ],
)
def test_an_odd_job_of_anybody_hides_no_other(
    dashboard: Dashboard, odd: Any, raytrain: Callable[..., Any], workplace: Path
) -> None:
    good = json.loads(details("SUCCEEDED", start_time=1_700_000_000_000))
    strange = {**json.loads(details()), **odd} if isinstance(odd, dict) else odd
    other = {**good, "submission_id": "raysubmit_1", "metadata": {}}
    dashboard.set("GET /api/jobs/", (200, json.dumps([strange, good, other]).encode()))
    ended = raytrain("jobs", "--address", dashboard.url)
    assert ended.status == 0, ended.err
    assert [line.split()[:2] for line in ended.out.splitlines()] == [["x-1", "SUCCEEDED"]]
    assert ended.err.startswith("1 job(s) of this cluster cannot be read: they are not as raytrain submit, or Ray, ")


@pytest.mark.parametrize("body", [b"{}x", b"3", b"null", b"[" * 100_000, b"<html>", b'"' + b"x" * 99])
def test_what_is_no_list_of_jobs_is_said(
    dashboard: Dashboard, body: bytes, raytrain: Callable[..., Any], workplace: Path
) -> None:
    dashboard.set("GET /api/jobs/", (200, body))
    ended = raytrain("jobs", "--address", dashboard.url)
    assert ended.status in (1, 2)
    assert ended.err.startswith(f"raytrain: {dashboard.url}: its answer is not one of a job server (") or (
        ended.err.startswith(f"raytrain: no good answer from {dashboard.url} (")
    )
    dashboard.set(JOB, (200, body))
    assert raytrain("jobs", "stop", "x-1", "--address", dashboard.url).status in (1, 2)


STEERING = "\x1b]0;owned\x07\x1b[2J\u202e\r"


def test_nothing_of_a_server_steers_the_terminal(
    dashboard: Dashboard, raytrain: Callable[..., Any], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {**OURS, "raytrain_words": f"train {STEERING}", "raytrain_run": STEERING, "raytrain_store": STEERING}
    odd = details("FAILED", metadata=about, message=STEERING, start_time=1, end_time=2)
    dashboard.set("GET /api/jobs/", (200, b"[" + odd + b"]"))
    dashboard.set(JOB, (200, odd))
    dashboard.set("GET /api/jobs/y-1", (404, STEERING.encode()))
    dashboard.set("GET /api/jobs/z-1", (400, STEERING.encode()))
    for words in (["jobs"], ["jobs", "follow", "x-1"], ["fetch", "y-1"], ["fetch", "z-1"]):
        ended = raytrain(*words, "--address", dashboard.url)
        assert "owned" in ended.out + ended.err
        assert not set("\x1b\x07\u202e\r") & set(ended.out + ended.err)
    verbs._show(f"step 1{STEERING}\n\tstep 2 \U0001f600\n")
    assert capsys.readouterr().out == "step 1]0;owned[2J\n\tstep 2 \U0001f600\n"


@pytest.mark.parametrize("verb", [["jobs", "stop"], ["jobs", "follow"], ["jobs", "resume"], ["fetch"]])
def test_a_name_that_is_none_asks_for_nothing(
    dashboard: Dashboard, verb: list[str], raytrain: Callable[..., Any], workplace: Path
) -> None:
    for name in (
        "..",
        ".",
        "x#y",
        "x?y",
        "a b",
        "",
        "-x",
        "x%2f",
        *(["../version", "a/b"] if verb != ["fetch"] else []),
    ):
        ended = raytrain(*verb, "--address", dashboard.url, "--", name)
        message = (
            f"JOB: expected letters, digits, '_', '.' and '-', as in digits-3f2a1c; got {name!r}; raytrain jobs lis"
        )
        assert (ended.status, ended.err[: 10 + len(message)]) == (2, f"raytrain: {message}")
    assert set(dashboard.asked) == {"GET /api/version"}


@pytest.mark.parametrize(
    ("address", "exposed"),
    [
        ("http://10.0.0.1:8265", True),
        ("http://head:8265", True),
        ("http://[fd00::1]:8265", True),
        ("https://head", False),
        ("http://127.0.0.1:8265", False),
        ("http://localhost:8265", False),
        ("http://[::1]:8265", False),
    ],
)
def test_a_token_that_others_can_read_on_the_way_is_told_of(
    address: str, exposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for there_is_one in (False, True):
        monkeypatch.setattr(client, "is_token_auth_enabled", lambda answer=there_is_one: answer)
        assert exposes_token(address) is (exposed and there_is_one)


def test_the_warning_of_a_token_is_printed(
    dashboard: Dashboard, raytrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard.set("GET /api/jobs/", (200, b"[]"))
    assert "the token goes to" not in raytrain("jobs", "--address", dashboard.url).err
    monkeypatch.setattr(client, "exposes_token", lambda address: address == dashboard.url)
    assert raytrain("jobs", "--address", dashboard.url).err.startswith(
        f"the token goes to {dashboard.url} as anybody on the way can read it; use https://, or a tunnel"
    )


def test_a_job_that_serves_files_may_be_gone_when_it_is_to_end(dashboard: Dashboard) -> None:
    serve_run(dashboard, details("RUNNING"))
    folder = ClusterFolder(JobServer(dashboard.url), Job("x-1", (), "/run"))
    assert folder.listing().keys() == {"a", "b"}
    dashboard.set("POST listing", (500, b"it hurts"))
    folder.close()
    folder.close()
