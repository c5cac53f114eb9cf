"""A cluster of our own, attacked by a stranger: a process here that knows each address but not the token."""

import json
import os
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from raytrain.kinds import RunOptions
from raytrain.training.recipe import TrainRecipe

STRANGER = """
import sys
import ray
from ray._raylet import GcsClient
what, address = sys.argv[1:]
if what == "read":
    print(GcsClient(address).internal_kv_keys(b"", None))
else:
    ray.init(address=address, log_to_driver=False)
    print(ray.get(ray.remote(lambda: "code ran").remote()))
"""
# A callback of rank 0: what its store holds, and where the process listens.
LOOK = """
import json
from pathlib import Path
import psutil
import torch.distributed as dist

def after_step(replica):
    if replica.rank == 0 and replica.progress.step == 2:
        store = dist.distributed_c10d._get_default_store()
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        listens = [each.laddr.ip for each in psutil.Process().net_connections("tcp") if each.status == "LISTEN"]
        Path("FOUND").write_text(json.dumps({"keys": store.list_keys(), "listens": listens}))
"""
LOOPBACK = "127.0.0.1"


def processes() -> list[psutil.Process]:
    """Return this process, which started the cluster, and those of the cluster."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def ports(ray_cluster: None) -> list[int]:
    return sorted({listener.laddr.port for process in processes() for listener in listeners(process)})


def listeners(process: psutil.Process) -> Iterator[Any]:
    try:
        yield from (each for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN)
    except psutil.NoSuchProcess:
        return


def own_address() -> str:
    """Return an address of this machine that others can reach, or that of the loopback interface if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # which sends nothing
        except OSError:
            return LOOPBACK
        return str(probe.getsockname()[0])


def attack(what: str, address: str, **token: str) -> subprocess.CompletedProcess[str]:
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Without the first, Ray takes another of the machine's addresses for 127.0.0.1, at which nobody listens.
    quick = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    stranger = {**mine, **quick, **token}
    words = [sys.executable, "-c", STRANGER, what, address]
    return subprocess.run(words, env=stranger, capture_output=True, text=True, check=False)


def test_it_listens_on_this_machine_alone(ray_cluster: None) -> None:
    ray.get(ray.remote(lambda: None).remote())  # so that there is a worker
    found = {listener.laddr.ip for process in processes() for listener in listeners(process)}
    assert found <= {LOOPBACK, "::1", f"::ffff:{LOOPBACK}"}
    for port in ports(ray_cluster):
        with socket.socket() as probe:
            assert probe.connect_ex((own_address(), port)) != 0 or own_address() == LOOPBACK


@pytest.mark.parametrize("what", ["submit", "read"])
@pytest.mark.parametrize("token", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}], ids=["none", "another"])
def test_who_has_not_the_token_is_refused(ray_cluster: None, what: str, token: dict[str, str]) -> None:
    address = ray.get_runtime_context().gcs_address
    refused = attack(what, address, **token)
    assert refused.returncode != 0
    assert "code ran" not in refused.stdout
    assert "InvalidAuthToken" in refused.stderr


def test_who_has_it_is_let_in(ray_cluster: None) -> None:
    """So that it is the token that the others lack."""
    mine = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    accepted = attack("read", ray.get_runtime_context().gcs_address, **mine)
    assert accepted.returncode == 0, accepted.stderr


def test_what_speaks_http_takes_no_job_from_a_stranger(ray_cluster: None) -> None:
    """Ray's agents run a job, or install packages, for who asks them."""
    job = json.dumps({"entrypoint": "echo code ran", "submission_id": "stranger"}).encode()
    asked = {"/api/job_agent/jobs/": job, "/get_or_create_runtime_env": b""}
    answers = {path: [answer(port, path, body) for port in ports(ray_cluster)] for path, body in asked.items()}
    for path, statuses in answers.items():
        assert 401 in statuses, path
        assert not any(200 <= status < 300 for status in statuses), path


def answer(port: int, path: str, body: bytes) -> int:
    """Return the status of an HTTP answer; 0: what listens there speaks something else."""
    try:
        with urllib.request.urlopen(f"http://{LOOPBACK}:{port}{path}", body, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, HTTPException):
        return 0


def test_nobody_else_can_read_the_token_or_the_logs(ray_cluster: None) -> None:
    file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    token = file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    logs = Path(ray._private.worker._global_node.get_session_dir_path())
    assert logs.is_relative_to(file.parent)
    assert not any(token in " ".join(process.cmdline()) for process in processes())
    written = [path for path in logs.rglob("*") if path.is_file() and not path.is_symlink()]
    assert written
    assert not any(token.encode() in path.read_bytes() for path in written)


def test_a_run_in_it_ends_well_and_its_secret_is_written_nowhere(
    ray_cluster: None, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raytrain.launch import train as launch

    secret = "5ec2e7" * 5
    monkeypatch.setattr(launch.secrets, "token_hex", lambda _: secret)
    (workplace / "look.py").write_text(LOOK.replace("FOUND", str(workplace / "found.json")))
    recipe = {"kind": "train", "task": "raytrain.testing:tiny", "workers": 2, "steps": 3, "log": {"loggers": []}}
    asked = TrainRecipe.parse({**recipe, "resources": {"cpus": 1}, "callbacks": ["look:after_step"]})
    assert launch.run_on_ray(asked, RunOptions(workplace / "run")).status == "done"
    found = json.loads((workplace / "found.json").read_text())
    assert found["keys"]
    assert all(key.startswith(f"{secret}/") for key in found["keys"])
    assert set(found["listens"]) <= {LOOPBACK, "::1", f"::ffff:{LOOPBACK}"}
    folders = [workplace / "run", Path(ray._private.worker._global_node.get_session_dir_path())]
    written = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert not any(secret.encode() in path.read_bytes() for path in written)


def test_a_session_leaves_ray_the_environment_and_the_loggers_as_they_were(tmp_path: Path) -> None:
    """In a process of its own, because Ray has one state in each."""
    script = """
import logging
import os
from pathlib import Path
from ray._raylet import AuthenticationMode, get_authentication_mode
from raytrain.launch.train import RayCluster
from raytrain.run.directory import RunDirectory
from raytrain.training.recipe import TrainRecipe

def loggers():
    known = [logging.getLogger(name) for name in (None, "mine", "ray", "ray.train", "raytrain")]
    return [(each.level, list(each.handlers), each.propagate, each.disabled) for each in known]

logging.basicConfig(level=logging.INFO)
os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = "7"
recipe = TrainRecipe.parse({"kind": "train", "task": {"name": "digits"}, "workers": 1, "resources": {"cpus": 1}})
before, how_loud = dict(os.environ), loggers()
with RayCluster("local").session(recipe, RunDirectory(Path("run")), print):
    folder = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent
    assert folder.is_dir()
    assert get_authentication_mode() == AuthenticationMode.TOKEN
    assert [each for each, then in zip(loggers(), how_loud) if each != then] == [loggers()[2]], "Ray's alone is quiet"
assert not folder.exists()
assert get_authentication_mode() == AuthenticationMode.DISABLED
assert dict(os.environ) == before
assert loggers() == how_loud
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    words = [sys.executable, "-c", script]
    ended = subprocess.run(words, env=clean, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
