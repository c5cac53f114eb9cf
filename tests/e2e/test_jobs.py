"""Jobs on a real cluster, which asks for a token, as a user submits, follows, stops, resumes and fetches them."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray.util import get_node_ip_address

from raytrain.provenance import MARKER
from raytrain.recipe import read_toml
from raytrain.run.checkpoint import list_checkpoints, load_part, verify_checkpoint
from raytrain.run.rows import read_jsonl
from raytrain.testing import train_here
from raytrain.testing_command import Command, start_command
from raytrain.training.recipe import TrainRecipe

pytestmark = pytest.mark.timeout(900)  # on a busy machine; alone it takes an eighth

TOKEN = "0123456789abcdef0123456789abcdef"
RECIPE = """
kind = "train"
resources.cpus = 1
log.loggers = []
[task]
name = "mine:small"
[checkpoint]
every = 2
"""
MINE = """
from raytrain.tasks.digits import DigitsOptions, digits

def small():
    return digits(DigitsOptions(name="digits", model="mlp", widths=(4,)))

def fail(replica):
    if replica.progress.step == 3:
        raise ValueError("boom")
"""
# A command that does not wait long for a server that is gone.
IMPATIENT = (
    "import raytrain.launch.jobs.client as jobs; jobs.RECONNECT_SECONDS = 3; from raytrain.cli.main import main; main()"
)


@dataclass(frozen=True)
class Cluster:
    """A head node, and a folder of a user of it."""

    url: str
    address: str
    home: Path
    user: Path
    environment: dict[str, str]

    def start(self, *words: str, **changes: str) -> Command:
        """Start the command."""
        return start_command(words, self.user, {**self.environment, **changes})

    def call(self, *words: str, **changes: str) -> tuple[int, str, str]:
        """Call the command."""
        return self.start(*words, **changes).finish()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as taken:
        sockets = [taken.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def answers(url: str) -> bool:
    request = urllib.request.Request(f"{url}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):
        return True
    return False


PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "ray-client-server-port",
    "node-manager-port",
    "object-manager-port",
    "runtime-env-agent-port",
)
AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ADDRESS": ""}
PATIENCE = dict.fromkeys(
    ("RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT", "RAY_DASHBOARD_STARTUP_TIMEOUT_S"), "300"
)


@contextlib.contextmanager
def head(home: Path) -> Iterator[dict[str, int]]:
    """A head node, and its ports; none if it did not come up, as on a machine that is very busy."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    words = ["start", "--head", "--block", "--num-cpus=2", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    words += [f"--{name}={port}" for name, port in ports.items()]
    words += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={home}", "--object-store-memory=100000000"]
    programs = Path(sys.executable).parent
    path = {"HOME": str(home), "PATH": f"{programs}:{os.environ['PATH']}"}
    with (home / "head.log").open("w") as log:
        environment = {**os.environ, **AUTHENTICATION, **PATIENCE, **path}
        command = subprocess.Popen([programs / "ray", *words], env=environment, stdout=log, stderr=subprocess.STDOUT)
    process = psutil.Process(command.pid)
    url = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        while not (up := "Ray runtime started" in (home / "head.log").read_text() and answers(url)):
            if command.poll() is not None:
                break
            time.sleep(0.5)
        yield ports if up else {}
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in [*process.children(recursive=True), process]:
                each.kill()
        command.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    user = tmp_path_factory.mktemp("user")
    (user / "mine.toml").write_text(RECIPE)
    (user / "mine.py").write_text(MINE)
    (user / ".gitignore").write_text("secret.txt\n")
    (user / "secret.txt").write_text("not for the cluster")
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            # Sockets lie below it, and their paths must be short.
            home = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="rt", dir="/tmp", ignore_cleanup_errors=True))
            )
            if ports := stack.enter_context(head(home)):
                break
        else:
            pytest.fail(f"no head came up:\n{(home / 'head.log').read_text()}")
        url = f"http://127.0.0.1:{ports['dashboard-port']}"
        address = f"{get_node_ip_address()}:{ports['port']}"  # for which Ray takes 127.0.0.1 too, wherever it listens
        yield Cluster(url, address, home, user, {**os.environ, **AUTHENTICATION, "RAY_API_SERVER_ADDRESS": url})


@pytest.fixture(autouse=True)
def heard(cluster: Cluster) -> Iterator[None]:
    """What the head's dashboard says of errors while a test runs, which pytest shows if it fails."""
    logs = cluster.home / "session_latest" / "logs"
    before = {file: file.stat().st_size for file in logs.glob("dashboard*.log")}
    yield
    for file in sorted(logs.glob("dashboard*.log")):
        with file.open(errors="replace") as log:
            log.seek(before.get(file, 0))
            said = [line.rstrip() for line in log if " INFO " not in line]
        print(f"--- {file.name}", *said[-60:], sep="\n", file=sys.stderr)


class Line:
    """A line to the job server that can be cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._connect, args=(self._listener.accept()[0],), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", self._port)) as far:
            self._open += [near, far]
            back = threading.Thread(target=self._carry, args=(far, near))
            back.start()
            self._carry(near, far)
            back.join()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        while self._open:
            with contextlib.suppress(OSError):
                self._open.pop().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()


def name_in(text: str) -> str:
    """Return the name of the job that a command submitted."""
    return re.search(r"submitted as (\S+),", text).group(1)


def wait_for(what: Callable[[], Any]) -> Any:
    give_up = time.monotonic() + 600
    while time.monotonic() < give_up:
        if found := what():
            return found
        time.sleep(0.2)
    raise TimeoutError(what)


@dataclass(frozen=True)
class Pair:
    """Two jobs that ran at once: one to its end, one until it was stopped."""

    short: tuple[int, str, str]
    long: tuple[int, str, str]
    looker: tuple[int, str, str]
    stop: tuple[int, str, str]
    shared: Path


@pytest.fixture(scope="module")
def pair(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    shared = tmp_path_factory.mktemp("shared")
    short = cluster.start("submit", "--", "train", "mine.toml", "--set", "steps=20", "seed=1")
    started = cluster.call(
        "submit",
        "--detach",
        "--storage",
        f"file://{shared}",
        "--",
        *["train", "mine.toml", "steps=1000000", "seed=2", "checkpoint.every=100", "evaluation.every=1000"],
    )
    assert started[0] == 0, started[2]
    name = name_in(started[2])
    long = cluster.start("jobs", "follow", name)
    line = Line(int(cluster.url.rpartition(":")[2]))
    shown = shared / "shown.txt"
    with shown.open("w") as stream:
        looker = subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, "jobs", "follow", name, "--address", line.url],
            cwd=cluster.user,
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.PIPE,
            text=True,
        )
    for act in (line.cut, line.close):
        before = shown.read_text().count("\nstep ")
        wait_for(lambda before=before: shown.read_text().count("\nstep ") > before)
        act()
    _, err = looker.communicate(timeout=600)
    out = shown.read_text()
    short_ended = short.finish()
    stop = cluster.call("jobs", "stop", name)
    return Pair(short_ended, long.finish(), (looker.returncode, out, err), stop, shared)


def test_a_job_shows_its_log_and_its_run_is_fetched(cluster: Cluster, pair: Pair) -> None:
    status, out, err = pair.short
    assert status == 0, out + err
    name = name_in(err)
    assert name.startswith("mine-")
    assert re.search(r"^step 20/20 .*valid accuracy", out, re.MULTILINE)
    assert err.splitlines()[-2:] == [f"{name}: succeeded", f"bring its run here with: raytrain fetch {name}"]
    status, _, err = cluster.call("fetch", name)
    assert status == 0, err
    run = cluster.user / "runs" / name
    assert json.loads((run / "result.json").read_text())["status"] == "done"
    assert [path.name for path in list_checkpoints(run / "checkpoints")][-1] == "step-00000020"
    for path in list_checkpoints(run / "checkpoints"):
        verify_checkpoint(path)
    left = cluster.home / "raytrain-runs" / name
    assert {path.name for path in run.iterdir()} == {
        MARKER,
        *(path.name for path in left.iterdir() if path.name[0] != "."),
    }
    assert (run / MARKER).read_text() == f"job {name} at {cluster.url}\n"
    assert list(cluster.home.glob("session_2*/logs/raytrain-*")) == []  # what the dashboard served it from
    status, _, err = cluster.call("fetch", name)
    assert (status, err) == (2, f"raytrain: runs/{name} is there already, and not empty; name another folder\n")


def test_a_run_that_joins_the_cluster_equals_the_job_and_leaves_the_cluster_running(
    cluster: Cluster, pair: Pair
) -> None:
    words = ["train", "mine.toml", "steps=20", "seed=1", "--address", cluster.address, "--out", "joined"]
    status, _, err = cluster.call(*words)
    assert status == 0, err
    job = cluster.home / "raytrain-runs" / name_in(pair.short[2])
    one, other = (
        load_part(list_checkpoints(run / "checkpoints")[-1], 0)["model"] for run in (job, cluster.user / "joined")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert answers(cluster.url)


def test_two_jobs_at_once_do_not_mix(cluster: Cluster, pair: Pair) -> None:
    names = [name_in(pair.short[2]), pair.stop[2].split()[0]]
    runs = [cluster.home / "raytrain-runs" / names[0], pair.shared / names[1]]
    assert [read_toml(str(run), [])[0]["seed"] for run in runs] == [1, 2]
    assert [len(read_jsonl(run / "attempts.jsonl")) for run in runs] == [1, 1]
    assert [path.name for path in (cluster.home / "raytrain-runs").iterdir()] == [names[0]]
    listing = {line.split()[0]: line.split()[1] for line in cluster.call("jobs")[1].splitlines()}
    assert {name: listing[name] for name in names} == dict(zip(names, ["SUCCEEDED", "STOPPED"], strict=True))


def test_a_stopped_job_has_saved_and_can_be_resumed_anywhere(cluster: Cluster, pair: Pair) -> None:
    status, out, err = pair.long
    name = pair.stop[2].split()[0]
    assert status == 130, out + err
    assert "stopping: the workers save and end after the step they are at" in out
    assert err.splitlines() == [
        f"{name}: stopped",
        f"go on from its newest checkpoint with: raytrain jobs resume {name}",
        f"bring its run here with: raytrain fetch {name}",
    ]
    assert pair.stop[0] == 0
    assert pair.stop[2].splitlines()[-2:] == [
        f"{name} has ended: STOPPED",
        f"bring its run here with: raytrain fetch {name}",
    ]
    status, _, err = cluster.call("fetch", name, "here")
    assert status == 0, err
    result = json.loads((cluster.user / "here" / "result.json").read_text())
    assert result["status"] == "interrupted"
    steps = result["figures"]["steps"]
    assert list_checkpoints(cluster.user / "here" / "checkpoints")[-1].name == f"step-{steps:08d}"
    raw, _ = read_toml(str(cluster.user / "here"), [])
    sys.path.append(str(cluster.user))
    run = train_here(TrainRecipe.parse(raw).with_overrides({"steps": steps + 5}), cluster.user / "here")
    sys.path.remove(str(cluster.user))
    assert run.failure() is None
    assert read_jsonl(run.attempts)[-1]["from_step"] == steps


def test_a_lost_connection_is_taken_up_again_and_then_given_up(cluster: Cluster, pair: Pair) -> None:
    status, out, err = pair.looker
    name = pair.stop[2].split()[0]
    assert status == 1
    lost = err.count("lost the connection to http://127.0.0.1:")
    assert lost in (1, 2)  # a cut that is over before the server is asked again is none
    last = err.splitlines()[-1]
    assert re.match(r"raytrain: no connection to http://127.0.0.1:\d+ for 3 s \(.*Connection refused\). If the ", last)
    assert f"cluster still runs, so does the job: raytrain jobs follow {name} --address http://127.0.0.1:" in last
    assert pair.long[1].startswith(out)  # nothing twice, nothing missing
    assert "\nstep " in out


@pytest.fixture(scope="module")
def failed(cluster: Cluster, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A job that fails, while another one goes on where one was stopped."""
    store = tmp_path_factory.mktemp("store")
    words = ["train", "mine.toml", "steps=20", 'callbacks=["mine:fail"]']
    failing = cluster.start("submit", "--name", "bang", "--storage", f"local://{store}", "--", *words)
    steps = json.loads((pair.shared / pair.stop[2].split()[0] / "result.json").read_text())["figures"]["steps"]
    resumed = cluster.call("jobs", "resume", pair.stop[2].split()[0], f"steps={steps + 5}")
    return failing.finish(), resumed, store, steps


def test_a_failing_job_returns_its_status_and_is_stored_too(cluster: Cluster, failed: Any) -> None:
    (status, out, err), _, store, _ = failed
    assert status == 1, out + err
    name = name_in(err)
    assert "worker 0: ValueError: boom" in out
    assert f"stored at local://{store}/{name}: " in out
    assert f"{name}: failed with exit status 1" in err
    status, _, err = cluster.call("fetch", f"local://{store}/{name}", "stored")
    assert status == 0, err
    assert [path.name for path in list_checkpoints(cluster.user / "stored" / "checkpoints")] == ["step-00000002"]
    assert json.loads((cluster.user / "stored" / "result.json").read_text())["status"] == "failed"


def test_a_stopped_job_is_resumed_on_the_cluster(pair: Pair, failed: Any) -> None:
    _, (status, out, err), _, steps = failed
    assert status == 0, out + err
    run = pair.shared / pair.stop[2].split()[0]
    assert read_jsonl(run / "attempts.jsonl")[-1]["from_step"] == steps
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["figures"]["steps"]) == ("done", steps + 5)


def test_a_job_that_is_refused_on_the_cluster_returns_2(cluster: Cluster) -> None:
    (cluster.user / "runs").mkdir(exist_ok=True)
    status, out, err = cluster.call("submit", "--", "train", "mine.toml", "workers=3")
    assert status == 2, out + err
    assert "raytrain: workers: 3 workers of 1 CPU each do not fit on 1 machine(s) with 2 CPUs" in out
    assert err.splitlines()[-1] == f"{name_in(err)}: failed with exit status 2"
    packages = list(cluster.home.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"))
    assert packages
    for package in packages:
        assert not {"secret.txt", "runs"} & {path.name for path in package.iterdir()}
    status, _, err = cluster.call("fetch", name_in(err), "nothing")
    assert (status, "the job left none, or it was removed" in err) == (2, True)


def test_a_kind_of_somebody_elses_goes_to_the_cluster_with_the_code_and_comes_back(cluster: Cluster) -> None:
    """The cluster has neither its package nor its entry point."""
    installed = Path(__file__).parent / "data" / "lottery"
    environment = {**cluster.environment, "PYTHONPATH": str(installed)}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "raytrain", *words]
        return subprocess.run(
            command, cwd=cluster.user, env=environment, capture_output=True, text=True, check=False, timeout=600
        )

    ended = call("submit", "--with-code", "--", "lottery", "quick", "draws=3")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"^draw 3/3 ", ended.stdout, re.MULTILINE)
    name = name_in(ended.stderr)
    fetched = call("fetch", name)
    assert fetched.returncode == 0, fetched.stderr
    result = json.loads((cluster.user / "runs" / name / "result.json").read_text())
    assert (result["status"], result["figures"]) == ("done", {"draws": 3})


def test_the_token_is_needed_and_must_be_right(cluster: Cluster) -> None:
    status, _, err = cluster.call("jobs", RAY_AUTH_MODE="disabled")
    advice = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to that of the cluster\n"
    assert (status, err) == (2, f"raytrain: --address: {cluster.url} asks for a token; {advice}")
    status, _, err = cluster.call("submit", "--", "train", "mine.toml", RAY_AUTH_TOKEN=TOKEN[::-1])
    assert (status, err) == (2, f"raytrain: --address: {cluster.url} refuses the token; {advice}")
    (cluster.home / "token").write_text(TOKEN)
    status, _, err = cluster.call("jobs", RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH=str(cluster.home / "token"))
    assert status == 0, err


def test_a_job_that_is_not_there_is_said(cluster: Cluster) -> None:
    status, _, err = cluster.call("jobs", "follow", "nothing-1")
    assert (status, err) == (2, "raytrain: Job nothing-1 does not exist; raytrain jobs lists those that there are\n")


@pytest.fixture
def server() -> Iterator[Callable[[bytes], str]]:
    """Start web servers that answer everything with the same."""
    running = []

    def serve(body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        running.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}"

    yield serve
    for each in running:
        each.shutdown()
        each.server_close()


def test_what_is_no_job_server_is_said_at_once(
    raytrain: Callable[..., Any], workplace: Path, server: Callable[[bytes], str]
) -> None:
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    for words in (
        ["submit", "--address", nobody, "--", "train", "digits"],
        ["jobs", "follow", "x", "--address", nobody],
    ):
        ended = raytrain(*words)
        assert ended.status == 2
        assert f"--address: no Ray dashboard answers at {nobody} ([Errno 111] Connection refused); is the " in ended.err
    page = server(b"<html>hello</html>")
    ended = raytrain("fetch", "x", "--address", page)
    assert (ended.status, f"what answers at {page} is not a Ray dashboard, whose port" in ended.err) == (2, True)
    old = server(b'{"version": "4", "ray_version": "2.40.0"}')
    ended = raytrain("jobs", "--address", old)
    assert (ended.status, f"--address: {old} runs Ray 2.40.0, and this machine has Ray 2.55" in ended.err) == (2, True)
    ended = raytrain("jobs", "--address", "ray://here:10001")
    assert (ended.status, "expected the cluster's dashboard, as http://HOST:8265; got 'ray" in ended.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["submit", "--", "train", "digit"], "nor a task as module:attribute; did you mean digits or digits-tpe?"),
        (["submit", "--", "train", "digits", "--set", "wrokers=2"], "wrokers: no such field; did you mean workers?"),
        (["submit", "--", "train", "digits", "--sett", "x=1"], "No such option"),
        (["submit", "--", "train"], "Missing argument 'RECIPE'"),
        (["submit"], "Missing argument"),
        (
            ["submit", "--", "evaluate", "x"],
            "'evaluate' does not run a recipe, as in raytrain submit -- train digits; k",
        ),
        (["submit", "--", "train", "digits", "--address", "auto"], "--address: it goes before the words of the job"),
        (["submit", "--", "train", "digits", "--resume", "--out", "x"], "--out: expected an absolute path, as the clu"),
        (["submit", "--", "train", "digits", "--resume"], "--resume: raytrain jobs resume JOB goes on with a run that"),
        (["submit", "--name", "a b", "--", "train", "digits"], "--name: expected letters, digits, '_', '.' and '-', a"),
        (["submit", "--storage", "runs", "--", "train", "digits"], "--storage: expected an absolute path that the clu"),
        (["submit", "--", "train", "text.toml", "task.path={}/data.txt"], "it relative to it, as 'data.txt'"),
        (
            ["submit", "--", "train", "text.toml", "task.path=hidden/a.txt"],
            "task.path: hidden/a.txt is not uploaded ",
        ),
        (["submit", "--", "train", "runs/x"], "runs/x is not uploaded with the job: runs/, .venv/, .git/, what .giti"),
        (
            ["submit", "--", "train", "../other.toml"],
            "../other.toml is outside the current folder, which is what a job",
        ),
        (
            ["submit", "--", "train", "digits", "name=big"],
            "holds 200.0 MiB, where Ray takes at most 100.0 MiB; the larg",
        ),
        (["jobs", "--address", "x", "stop", "y"], "--address goes behind stop"),
        (["fetch", "/no/where"], "/no/where: there is no such folder on this machine"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(
    raytrain: Callable[..., Any], workplace: Path, words: list[str], message: str
) -> None:
    for name, text in {
        "text.toml": 'task.name = "text"\n',
        "../other.toml": 'task = "digits"\n',
        "runs/x/recipe.toml": 'task = "digits"\n',
        ".gitignore": "hidden/\n",
        "hidden/a.txt": "",
    }.items():
        (workplace / name).parent.mkdir(parents=True, exist_ok=True)
        (workplace / name).write_text(text)
    if "name=big" in words:
        (workplace / "sparse.bin").touch()
        os.truncate(workplace / "sparse.bin", 200 << 20)
    ended = raytrain(*(word.format(workplace) for word in words))
    assert ended.status == 2
    assert message in re.sub(r"\s+", " ", ended.err.replace("│", ""))
