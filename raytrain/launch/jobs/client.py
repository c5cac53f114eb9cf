"""Client of Ray's job server: submit, follow, stop and fetch."""

import asyncio
import ipaddress
import os
import re
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException, IncompleteRead
from typing import Any, NoReturn
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

import raytrain
from raytrain.environment import environment
from raytrain.errors import RaytrainError, RecipeError, TrainingError
from raytrain.launch.jobs.job import ID, Job, JobLog, check_id
from raytrain.launch.jobs.upload import Upload, own_code
from raytrain.launch.version import fingerprint
from raytrain.loggers import only_errors
from raytrain.terminal import printable, printable_line

ADDRESS = "RAY_API_SERVER_ADDRESS"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ANSWER_SECONDS = 5.0  # for a server to say that it is there
TIMEOUT_SECONDS = {"GET": 20.0, "POST": 60.0, "DELETE": 20.0, "PUT": 600.0}  # the last uploads
SILENCE_SECONDS = 10.0  # without a line of the log, after which the server is asked whether it is still there
RECONNECT_SECONDS = 60.0
RETRY_SECONDS = 1.0
LOG_ATTEMPTS = 3  # to read more of a log while the server answers, before it is said that it cannot be read
UPLOAD_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env")
"""Of Ray, which tell the steps of an upload."""

STOP_SECONDS = "300"  # that Ray leaves a stopped job to save; its own default is 3
LATEST = 253402300799.0
"""The last second of which there is a date, since 1970."""


class LostError(TrainingError, ConnectionError):
    """The job server does not answer any more, or fails."""


class _Client(JobSubmissionClient):
    """Ray's client, which waits for answers only so long, and whose errors can be told apart."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        known = self._server_ray_version is not None
        patience = TIMEOUT_SECONDS[method] if known else ANSWER_SECONDS
        allowed = {"timeout": (ANSWER_SECONDS, patience), "allow_redirects": False}
        response = super()._do_request(method, endpoint, **{**allowed, **options})
        self._check_place(response)
        return response

    def _check_place(self, response: Any) -> None:
        """Check that the answer is the server's own: who is redirected would believe another one, unknowingly."""
        if response.is_redirect:
            raise RecipeError(
                f"--address: {self._address} sends on to {response.headers['location']!r}, where raytrain does not "
                "follow; name that address if it is the cluster's"
            )

    def _raise_error(self, response: Any) -> NoReturn:
        if response.status_code == 404:
            raise RecipeError(f"{printable_line(response.text[:1000])}; raytrain jobs lists those that there are")
        last = printable_line(response.text.strip().rpartition("\n")[2])
        answer = f"the job server answered with status {response.status_code}: {last}"
        if response.status_code >= 500:
            raise ConnectionError(answer)  # it, or something before it, fails: that says nothing of the request
        raise RuntimeError(answer)

    def listed(self) -> list[Any]:
        """Return the details of each job; Ray's own stops at the first one that is malformed."""
        response = self._do_request("GET", "/api/jobs/")
        if response.status_code != 200:
            self._raise_error(response)
        return [*response.json()]

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """Yield the log of a job as it grows, from this server alone."""
        tracing = aiohttp.TraceConfig()
        tracing.on_request_redirect.append(_refuse_redirect)
        session = aiohttp.ClientSession(cookies=self._cookies, headers=self._headers, trace_configs=[tracing])
        url, verified = f"{self._address}/api/jobs/{job_id}/logs/tail", self._ssl_context
        async with session, session.ws_connect(url, ssl=True if verified is None else verified) as log:
            async for message in log:
                if message.type != aiohttp.WSMsgType.TEXT:
                    raise RuntimeError(f"the log came as {message.type.name}")
                yield message.data
            if log.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE:
                raise RuntimeError(f"the connection was closed with code {log.close_code}")

    def stream(self, endpoint: str, asked: Mapping[str, Any]) -> requests.Response:
        """Ask for what may be large; `_do_request` reads all of any answer as text, to look for a refused token."""
        response = requests.get(
            f"{self._address}{endpoint}",
            params=asked,
            headers=self._headers,
            cookies=self._cookies,
            verify=self._verify,
            timeout=(ANSWER_SECONDS, TIMEOUT_SECONDS["GET"]),
            stream=True,
            allow_redirects=False,
        )
        self._check_place(response)
        return response


async def _refuse_redirect(*event: Any) -> None:
    raise RuntimeError(f"the log is sent on to {event[2].response.headers.get('Location')!r}, which is not followed")


class JobServer:
    """The job server of a Ray cluster.

    Args:
        address: of the dashboard, as http://HOST:8265.

    Raises:
        RecipeError: there is none, it does not let us in, or its Ray is another.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        with (
            only_errors(*UPLOAD_LOGGERS),
            _explained_connection(address),
            environment({ADDRESS: address}),
        ):  # which Ray prefers to what it is given
            self.client = _Client(address)
        found = str(self.client._server_ray_version)
        if found.split(".")[:2] != ray.__version__.split(".")[:2]:
            raise RecipeError(
                f"--address: {address} runs Ray {found}, and this machine has Ray {ray.__version__}; install the same "
                "version on both"
            )

    def submit(self, job: Job, upload: Upload) -> None:
        """Start a job.

        Args:
            job: its name, words and place.
            upload: files for the job.

        Raises:
            RecipeError: the server refuses it.
            LostError: the server is gone; the job may run all the same.
        """
        entry = ["python", "-m", "raytrain.cli.job_entry", "run", "--out", job.run, "--code", fingerprint()]
        store = ["--store", job.store] if job.store else []
        environment: dict[str, Any] = {
            "working_dir": str(upload.folder),
            "excludes": upload.excludes(),
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
        with only_errors(*UPLOAD_LOGGERS), self.explained(job.id):
            self.client.submit_job(
                entrypoint=shlex.join([*entry, *store, "--", *job.words]),
                submission_id=job.id,
                runtime_env=environment,
                metadata=about,
            )

    def job(self, name: str) -> Job:
        """Return the details of a job.

        Raises:
            RecipeError: there is none of that name, or it is not one of ours.
        """
        check_id(name)
        with self.explained(name):
            details = self.client.get_job_info(name)
        try:
            job = _job_of(details)
        except ValueError as error:
            raise RecipeError(f"{name} is not as raytrain submit makes a job: {printable_line(str(error))}") from error
        if job is None:
            raise RecipeError(f"{name} was not submitted with raytrain submit")
        return job

    def jobs(self) -> tuple[list[Job], int]:
        """Return our jobs, the oldest first, and how many jobs there are, of anybody, that cannot be read."""
        with self.explained():
            listed = self.client.listed()
        found: list[Job] = []
        odd = 0
        for raw in listed:
            try:
                job = _job_of(JobDetails(**raw))
            except (ValueError, TypeError):
                odd += 1
            else:
                found += [job] if job else []
        return sorted(found, key=lambda job: job.started), odd

    def stop(self, name: str) -> None:
        """Ask a job to checkpoint and end, without waiting for it."""
        with self.explained(name):
            self.client.stop_job(name)

    def follow(self, name: str, log: JobLog, say: Callable[[str], None]) -> Job:
        """Stream the log of a job until it ends, over a lost connection too, and return the job.

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
                broken = reason_of(error)
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
        lines = self.client.tail_job_logs(name)
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
                raise LostError(reason_of(error)) from error
            if text is None:
                return
            take(text)

    def _found_again(self, name: str, say: Callable[[str], None]) -> Job:
        """Return the details of a job, and wait for a server that does not answer."""
        give_up, told = time.monotonic() + RECONNECT_SECONDS, False
        while True:
            try:
                return self.job(name)
            except LostError as error:
                reason = reason_of(error)
                if time.monotonic() > give_up:
                    raise TrainingError(
                        f"no connection to {self.address} for {RECONNECT_SECONDS:g} s ({reason}). If the cluster still "
                        f"runs, so does the job: raytrain jobs follow {name} --address {self.address}"
                    ) from error
            if not told:
                say(f"lost the connection to {self.address} ({reason}); trying again for {RECONNECT_SECONDS:g} s")
            told = True
            time.sleep(RETRY_SECONDS)

    @contextmanager
    def explained(self, job: str = "") -> Iterator[None]:
        """Tell a server that is gone from one that refuses.

        Args:
            job: of which it is not known then what became of it.

        Raises:
            LostError: it is gone.
            RecipeError: it refuses, or its answer is none.
        """
        try:
            yield
        except AuthenticationError as error:
            raise RecipeError(_token_advice(self.address, str(error))) from error
        except OSError as error:
            way_out = f"; raytrain jobs --address {self.address} shows whether {job} runs" if job else ""
            raise LostError(f"no good answer from {self.address} ({reason_of(error)}){way_out}") from error
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            what = f"{type(error).__name__}: {printable_line(str(error))}"
            raise RecipeError(f"{self.address}: its answer is not one of a job server ({what})") from error
        except RuntimeError as error:
            raise RecipeError(f"{self.address}: {error}") from error


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


def exposes_token(address: str) -> bool:
    """Return whether a token would go to a server, or to who listens on the way, as anybody can read it."""
    url = urlsplit(address)
    host = url.hostname or ""
    try:
        here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost"
    return bool(is_token_auth_enabled()) and url.scheme == "http" and not here


def _job_of(details: JobDetails) -> Job | None:
    """Return one of our jobs, or nothing of another's.

    Raises:
        ValueError: it says that it is ours, and is not as we make them.
    """
    about: Mapping[str, str] = details.metadata or {}
    if not {"raytrain_words", "raytrain_run"} <= about.keys():
        return None
    times = [(moment or 0) / 1000 for moment in (details.start_time, details.end_time)]
    if not re.fullmatch(ID, str(details.submission_id)) or not all(0 <= moment <= LATEST for moment in times):
        raise ValueError("its name or its time is none")
    return Job(
        id=str(details.submission_id),
        words=tuple(shlex.split(about["raytrain_words"])),
        run=about["raytrain_run"],
        store=about.get("raytrain_store", ""),
        with_code=bool(about.get("raytrain_code")),
        status=str(details.status),
        message=printable(details.message or ""),
        exit_code=details.driver_exit_code,
        started=times[0],
        ended=times[1],
        node=details.driver_node_id or "",
    )


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
            f"--address: no Ray dashboard answers at {address} ({reason_of(error)}); is the cluster's head running, "
            "and its port 8265 open to this machine?"
        ) from error
    except RaytrainError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, LookupError) as error:
        raise RecipeError(
            f"--address: what answers at {address} is not a Ray dashboard, whose port is usually 8265 "
            f"({type(error).__name__}: {printable_line(str(error))})"
        ) from error


def _token_advice(address: str, reason: str) -> str:
    given = "refuses the token" if "invalid" in reason.lower() else "asks for a token"
    return (
        f"--address: {address} {given}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to that of "
        "the cluster"
    )


def reason_of(error: BaseException) -> str:
    """Return the innermost cause of an error, in one line."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    if isinstance(error, HTTPException) and not isinstance(error, ConnectionError | IncompleteRead):
        return "it does not speak HTTP"
    return printable_line(str(error)) or type(error).__name__
