"""A run's folder on a cluster, served by Ray's dashboard."""

import secrets
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails

from raytrain.errors import RecipeError
from raytrain.launch.jobs.client import JobServer, LostError, reason_of
from raytrain.launch.jobs.job import SERVED, Job
from raytrain.launch.jobs.storage import CHUNK_BYTES, LIST, ChangedError, Listing, read_list
from raytrain.launch.jobs.upload import own_code
from raytrain.terminal import printable_line

START_SECONDS = 180.0  # for the small job that serves a run's files
STOP_WAIT_SECONDS = 20.0
TROUBLE_SECONDS = 30.0  # in which the dashboard is asked again for a file that it fails to give
POLL_SECONDS = 0.2


class ClusterFolder:
    """A run's folder on the cluster, served by Ray's dashboard, which serves the files among its logs.

    A small job on the machine where the folder is puts links to the run's files there, and takes them away at its end.

    Args:
        server: of the cluster.
        job: whose folder it is.
    """

    def __init__(self, server: JobServer, job: Job) -> None:
        self.origin = f"job {job.id} at {server.address}"
        self._server = server
        self._job = job
        self._node = job.node
        self._place = self._serving = ""

    def listing(self) -> Listing:
        """Return the files, as listed by the serving job."""
        self.close()
        name = f"fetch-{self._job.id}-{time.time_ns():x}"
        self._place = f"{SERVED}{self._job.id}-{secrets.token_hex(8)}"
        words = ["python", "-m", "raytrain.cli.job_entry", "serve", "--out", self._job.run, "--place", self._place]
        with self._server.explained():
            self._server.client.submit_job(
                entrypoint=shlex.join(words),
                submission_id=name,
                runtime_env={"py_modules": own_code(), "excludes": ["__pycache__"]} if self._job.with_code else {},
                metadata={"job_name": name},
                entrypoint_label_selector={"ray.io/node-id": self._job.node} if self._job.node else None,
            )
            self._serving = name
            return self._listed()

    def _listed(self) -> Listing:
        """Wait for the small job to start, but not for ever, and then for its list: a large run takes long to read.

        Raises:
            RecipeError: it does not start, or ends without a list.
        """
        give_up = time.monotonic() + START_SECONDS
        while True:
            details = self._server.client.get_job_info(self._serving)
            if details.status.is_terminal() or (details.status == "PENDING" and time.monotonic() > give_up):
                raise RecipeError(f"{self._job.id}: {_why_no_list(details)}")
            if details.status == "RUNNING":
                self._node = str(details.driver_node_id)
                with suppress(NotThereError):
                    return read_list(self._read(LIST))
            time.sleep(POLL_SECONDS)

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a file in pieces."""
        return self._read(f"run/{name}")

    def close(self) -> None:
        """End the small job, and with it the links; one that cannot be reached now ends by itself."""
        name, self._serving = self._serving, ""
        if not name:
            return
        give_up = time.monotonic() + STOP_WAIT_SECONDS
        with suppress(LostError, RecipeError), self._server.explained():
            self._server.client.stop_job(name)
            while not self._server.client.get_job_info(name).status.is_terminal() and time.monotonic() < give_up:
                time.sleep(POLL_SECONDS)
            self._server.client.delete_job(name)

    def _read(self, name: str) -> Iterator[bytes]:
        file = f"{self._place}/{name}"
        asked = {"node_id": self._node, "filename": file, "lines": -1, "timeout": 86400}
        try:
            with self._given(name.removeprefix("run/"), asked) as response:
                yield from response.iter_content(CHUNK_BYTES)
        except OSError as error:
            raise OSError(
                f"{name.removeprefix('run/')} broke off ({reason_of(error)}); Ray's dashboard, {self._server.address}, "
                "gives each file 300 s"
            ) from error

    @contextmanager
    def _given(self, name: str, asked: Mapping[str, Any]) -> Iterator[requests.Response]:
        """Yield the answer that has a file, which is asked for again while the dashboard fails.

        On a busy machine Ray's was seen to answer with status 500 and to give no reason.

        Raises:
            ChangedError: it is not there, or still fails after a while.
        """
        patient_until = time.monotonic() + TROUBLE_SECONDS
        while True:
            with self._server.client.stream("/api/v0/logs/file", asked) as response:
                if response.status_code == 200:
                    yield response
                    return
                said = printable_line(next(response.iter_content(1000), b"").decode(errors="replace"))
            if "not found" in said:
                raise NotThereError(f"{name}: {said}")
            if time.monotonic() > patient_until:
                raise ChangedError(f"{name}: {said}")
            time.sleep(POLL_SECONDS)


class NotThereError(ChangedError):
    """The dashboard has no such file, or not yet."""


def _why_no_list(details: JobDetails) -> str:
    """Return why the small job that serves a run's files has not listed them."""
    if details.status == "PENDING":
        return (
            f"its machine did not start to list the run's files within {START_SECONDS:g} s; it is busy, or gone: try "
            "again later"
        )
    last = printable_line((details.message or "").strip().rpartition("\n")[2].removeprefix("raytrain: "))
    return last or f"its machine cannot list the run's files: {details.status.lower()}"
