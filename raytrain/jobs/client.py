"""Submits, follows, stops and fetches Ray jobs: one of the few files that know Ray."""

import asyncio
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException, IncompleteRead
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import aiohttp
import ray
import requests
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

import raytrain
from raytrain.cluster import fingerprint
from raytrain.errors import RaytrainError, RecipeError, TrainingError
from raytrain.jobs.job import SERVED, Job, Log
from raytrain.jobs.storage import CHUNK_BYTES, LIST, ChangedError, Listing, parse

ADDRESS = "RAY_API_SERVER_ADDRESS"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ANSWER_SECONDS = 5.0  # for a server to say that it is there
WAIT_SECONDS = {"GET": 20.0, "POST": 60.0, "DELETE": 20.0, "PUT": 600.0}  # the last uploads
SILENCE_SECONDS = 10.0  # without a line of the log, after which the server is asked whether it is still there
RECONNECT_SECONDS = 60.0
RETRY_SECONDS = 1.0
LOG_ATTEMPTS = 3  # to read more of a log while the server answers, before it is said that it cannot be read
START_SECONDS = 180.0  # for the small job that lists a run's files
STOP_SECONDS = "300"  # that Ray leaves a stopped job to save; its own default is 3
LEFT_OUT = (".git", ".venv", "venv", "__pycache__", "/runs")
PACKAGES = ("raytrain", "search", "federated")


class LostError(TrainingError, ConnectionError):
    """The job server does not answer any more, or fails."""


class _Client(JobSubmissionClient):
    """Ray's client, which waits for answers only so long, and whose errors can be told apart."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        known = self._server_ray_version is not None
        patience = WAIT_SECONDS[method] if known else ANSWER_SECONDS
        return super()._do_request(method, endpoint, **{"timeout": (ANSWER_SECONDS, patience), **options})

    def _raise_error(self, response: Any) -> None:
        if response.status_code == 404:
            raise RecipeError(f"{response.text}; raytrain jobs lists those that there are")
        last = response.text.strip().rpartition("\n")[2]
        answer = f"the job server answered with status {response.status_code}: {last}"
        if response.status_code >= 500:
            raise ConnectionError(answer)  # it, or something before it, fails: that says nothing of the request
        raise RuntimeError(answer)

    def stream(self, endpoint: str, asked: Mapping[str, Any]) -> requests.Response:
        """Ask for what may be large; `_do_request` reads all of any answer as text, to look for a refused token."""
        return requests.get(
            f"{self._address}{endpoint}",
            params=asked,
            headers=self._headers,
            cookies=self._cookies,
            verify=self._verify,
            timeout=(ANSWER_SECONDS, WAIT_SECONDS["GET"]),
            stream=True,
        )


class JobServer:
    """The job server of a Ray cluster.

    Args:
        address: of the dashboard, as http://HOST:8265.

    Raises:
        RecipeError: there is none, it does not let us in, or its Ray is another.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        for name in ("dashboard.modules.dashboard_sdk", "_private.runtime_env"):
            logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
        with _explained_connection(address), _environment(ADDRESS, address):  # which Ray prefers to what it is given
            self._client = _Client(address)
        found = str(self._client._server_ray_version)
        if found.split(".")[:2] != ray.__version__.split(".")[:2]:
            raise RecipeError(
                f"--address: {address} runs Ray {found}, and this machine has Ray {ray.__version__}; install the same "
                "version on both"
            )

    def submit(self, job: Job, folder: Path) -> None:
        """Start a job.

        Args:
            job: its name, words and place.
            folder: what it takes along.

        Raises:
            RecipeError: the server refuses it.
            LostError: the server is gone; the job may run all the same.
        """
        entry = ["python", "-m", "raytrain.jobs.entry", "run", "--out", job.run, "--code", fingerprint()]
        store = ["--store", job.store] if job.store else []
        environment: dict[str, Any] = {
            "working_dir": str(folder),
            "excludes": left_out(folder),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", STOP_SECONDS)},
        }
        if job.with_code:
            environment["py_modules"] = own_code()
        about = {
            "job_name": job.id,
            "raytrain": raytrain.__version__,
            "raytrain_words": shlex.join(job.words),
            "raytrain_run": job.run,
            "raytrain_store": job.store,
            "raytrain_code": "of the submitter" if job.with_code else "",
        }
        with self._explained(job.id):
            self._client.submit_job(
                entrypoint=shlex.join([*entry, *store, "--", *job.words]),
                submission_id=job.id,
                runtime_env=environment,
                metadata=about,
            )

    def job(self, name: str) -> Job:
        """Return what the server knows of a job.

        Raises:
            RecipeError: there is none of that name, or it is not one of ours.
        """
        with self._explained(name):
            details = self._client.get_job_info(name)
        job = _job_of(details)
        if job is None:
            raise RecipeError(f"{name} was not submitted with raytrain submit")
        return job

    def jobs(self) -> list[Job]:
        """Return our jobs, the oldest first."""
        with self._explained():
            found = [_job_of(details) for details in self._client.list_jobs()]
        return sorted((job for job in found if job), key=lambda job: job.started)

    def stop(self, name: str) -> None:
        """Ask a job to save and end; whether it has ended is another question."""
        with self._explained(name):
            self._client.stop_job(name)

    def follow(self, name: str, log: Log, say: Callable[[str], None]) -> Job:
        """Show the log of a job until it ends, over a lost connection too, and return how it ended.

        Where the server answers and the log cannot be read, as behind a proxy without WebSockets or when the machine
        that writes it is gone, this waits for the job's end all the same.

        Raises:
            TrainingError: the connection is lost for good.
        """
        failures, told = 0, False
        while True:
            shown, broken = log.shown, ""
            try:
                asyncio.run(self._tail(name, log.reader()))
            except LostError as error:
                broken = _reason(error)
            job = self._found_again(name, say)
            if job.over and not broken:
                return job
            failures = failures + 1 if log.shown == shown else 0
            if failures >= LOG_ATTEMPTS:
                if not told:
                    say(_unreadable(name, broken or "it ends before the job"))
                told = True
                if job.over:
                    return job
            time.sleep(RETRY_SECONDS if failures < LOG_ATTEMPTS else SILENCE_SECONDS)

    async def _tail(self, name: str, take: Callable[[str], None]) -> None:
        """Take the log until its end, or until the server does not answer."""
        lines = self._client.tail_job_logs(name)
        over = False
        while True:
            piece = asyncio.ensure_future(anext(lines, None))
            while not (await asyncio.wait({piece}, timeout=SILENCE_SECONDS))[0]:
                if over:
                    return
                over = (await asyncio.to_thread(self.job, name)).over
            try:
                text = piece.result()
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                raise LostError(_reason(error)) from error
            if text is None:
                return
            take(text)

    def _found_again(self, name: str, say: Callable[[str], None]) -> Job:
        """Return what the server knows of a job, and wait for one that does not answer."""
        give_up, told = time.monotonic() + RECONNECT_SECONDS, False
        while True:
            try:
                return self.job(name)
            except LostError as error:
                reason = _reason(error)
                if time.monotonic() > give_up:
                    raise TrainingError(
                        f"no connection to {self.address} for {RECONNECT_SECONDS:g} s ({reason}). If the cluster still "
                        f"runs, so does the job: raytrain jobs follow {name} --address {self.address}"
                    ) from error
            if not told:
                say(f"lost the connection to {self.address} ({reason}); trying again for {RECONNECT_SECONDS:g} s")
            told = True
            time.sleep(RETRY_SECONDS)

    def folder_of(self, job: Job) -> "ClusterFolder":
        """Return the folder of a job's run, as it lies on the cluster."""
        return ClusterFolder(self, job)

    @contextmanager
    def _explained(self, job: str = "") -> Iterator[None]:
        """Tell a server that is gone from one that refuses.

        Args:
            job: of which it is not known then what became of it.

        Raises:
            LostError: it is gone.
            RecipeError: it refuses.
        """
        try:
            yield
        except AuthenticationError as error:
            raise RecipeError(_token_advice(self.address, str(error))) from error
        except OSError as error:
            way_out = f"; raytrain jobs --address {self.address} shows whether {job} runs" if job else ""
            raise LostError(f"no good answer from {self.address} ({_reason(error)}){way_out}") from error
        except RuntimeError as error:
            raise RecipeError(f"{self.address}: {error}") from error


class ClusterFolder:
    """A run's folder on the cluster, served by Ray's dashboard, which serves the files among its logs.

    Args:
        server: of the cluster.
        job: whose folder it is.
    """

    def __init__(self, server: JobServer, job: Job) -> None:
        self._server = server
        self._job = job
        self._node = job.node

    def listing(self) -> Listing:
        """Return what there is, listed by a small job on the machine where the folder is."""
        client, name = self._server._client, f"fetch-{self._job.id}-{time.time_ns():x}"
        words = ["python", "-m", "raytrain.jobs.entry", "list", "--out", self._job.run, "--job", self._job.id]
        with self._server._explained():
            client.submit_job(
                entrypoint=shlex.join(words),
                submission_id=name,
                runtime_env={"py_modules": own_code(), "excludes": ["__pycache__"]} if self._job.with_code else {},
                metadata={"job_name": name},
                entrypoint_label_selector={"ray.io/node-id": self._job.node} if self._job.node else None,
            )
            details = self._ended(name)
            if details.status != "SUCCEEDED":
                client.stop_job(name)
                raise RecipeError(f"{self._job.id}: {_why_no_list(details)}")
            self._node = str(details.driver_node_id)
            client.delete_job(name)
            return parse(b"".join(self._read(LIST)))

    def _ended(self, name: str) -> JobDetails:
        """Wait for a small job to start, but not for ever, and then to end: a large run takes long to read."""
        give_up = time.monotonic() + START_SECONDS
        while True:
            details = self._server._client.get_job_info(name)
            late = details.status == "PENDING" and time.monotonic() > give_up
            if late or details.status.is_terminal():
                return details
            time.sleep(0.2)

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a file in pieces."""
        return self._read(name, "run/")

    def _read(self, name: str, folder: str = "") -> Iterator[bytes]:
        file = f"{SERVED}{self._job.id}/{folder}{name}"
        asked = {"node_id": self._node, "filename": file, "lines": -1, "timeout": 86400}
        try:
            with self._server._client.stream("/api/v0/logs/file", asked) as response:
                if response.status_code != 200:
                    raise ChangedError(f"{name}: {response.text.strip()}")
                yield from response.iter_content(CHUNK_BYTES)
        except OSError as error:
            raise OSError(
                f"{name} broke off ({_reason(error)}); Ray's dashboard, {self._server.address}, gives each file 300 s"
            ) from error


def address_of(given: str | None) -> str:
    """Return the address of the job server: as given, or by Ray's environment variables, or the default.

    Raises:
        RecipeError: it is not one of a dashboard.
    """
    cluster = os.environ.get("RAY_ADDRESS", "")  # which Ray also takes for HOST:PORT of the cluster itself
    elsewhere = cluster if cluster.startswith(("http://", "https://")) else DEFAULT_ADDRESS
    address = given or os.environ.get(ADDRESS) or elsewhere
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", url):
        raise RecipeError(f"--address: expected the cluster's dashboard, as http://HOST:8265; got {address!r}")
    return url


def taken_along(folder: Path) -> dict[str, int]:
    """Return the files that a job takes along, as Ray chooses them: path below `folder` -> size in bytes."""
    files: dict[str, int] = {}

    def take(path: Path) -> None:
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = path.stat().st_size

    heeded = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    quiet = logging.getLogger("ray._private.runtime_env")
    quiet.setLevel(logging.ERROR)
    _dir_travel(folder, [_get_excludes(folder, left_out(folder))], take, include_gitignore=heeded, logger=quiet)
    return files


def upload_limit() -> int:
    """Return how many bytes the job server takes."""
    return int(DASHBOARD_CLIENT_MAX_SIZE)


def left_out(folder: Path) -> list[str]:
    """Return what a job does not take along: results, environments, and our source, which the cluster has installed."""
    own = Path(raytrain.__file__).parents[1] == folder
    return [*LEFT_OUT, *(f"/{package}" for package in PACKAGES if own)]


def own_code() -> list[str]:
    """Return the folders of the raytrain of this machine, that of its metadata included, which names its kinds."""
    root = Path(raytrain.__file__).parents[1]
    metadata = next(file for file in distribution("raytrain").files or [] if file.name == "METADATA")
    folders = [*(root / package for package in PACKAGES), Path(str(metadata.locate())).parent]
    return [str(folder) for folder in folders if folder.is_dir()]


def _job_of(details: JobDetails) -> Job | None:
    about: Mapping[str, str] = details.metadata or {}
    if not {"raytrain_words", "raytrain_run"} <= about.keys():
        return None
    return Job(
        id=str(details.submission_id),
        words=tuple(shlex.split(about["raytrain_words"])),
        run=about["raytrain_run"],
        store=about.get("raytrain_store", ""),
        with_code=bool(about.get("raytrain_code")),
        status=str(details.status),
        message=details.message or "",
        exit_code=details.driver_exit_code,
        started=(details.start_time or 0) / 1000,
        ended=(details.end_time or 0) / 1000,
        node=details.driver_node_id or "",
    )


def _why_no_list(details: JobDetails) -> str:
    """Return why the small job that lists a run's files has not done so."""
    if details.status == "PENDING":
        return (
            f"its machine did not start to list the run's files within {START_SECONDS:g} s; it is busy, or gone: try "
            "again later"
        )
    last = (details.message or "").strip().rpartition("\n")[2].removeprefix("raytrain: ")
    return last or f"its machine cannot list the run's files: {details.status.lower()}"


def _unreadable(name: str, reason: str) -> str:
    return (
        f"the log of {name} cannot be read from here ({reason}); it is job-driver-{name}.log among Ray's logs on the "
        "machine that runs the job. Waiting for the job's end"
    )


@contextmanager
def _explained_connection(address: str) -> Iterator[None]:
    try:
        yield
    except AuthenticationError as error:
        raise RecipeError(_token_advice(address, str(error))) from error
    except (ConnectionError, TimeoutError) as error:
        raise RecipeError(
            f"--address: no Ray dashboard answers at {address} ({_reason(error)}); is the cluster's head running, and "
            "its port 8265 open to this machine?"
        ) from error
    except RaytrainError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, LookupError) as error:
        raise RecipeError(
            f"--address: what answers at {address} is not a Ray dashboard, whose port is usually 8265 "
            f"({type(error).__name__}: {_line(str(error))})"
        ) from error


def _token_advice(address: str, reason: str) -> str:
    given = "refuses the token" if "invalid" in reason.lower() else "asks for a token"
    return (
        f"--address: {address} {given}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to that of "
        "the cluster"
    )


def _reason(error: BaseException) -> str:
    """Return the innermost cause of an error, in one line."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    if isinstance(error, HTTPException) and not isinstance(error, ConnectionError | IncompleteRead):
        return "it does not speak HTTP"
    return _line(str(error)) or type(error).__name__


def _line(text: str) -> str:
    """Return text in one line; what speaks another protocol may have answered in bytes that are none."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
