"""Subcommands for jobs on a Ray cluster: submit, jobs, fetch."""

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from rich.console import Console

from raytrain.cli.request import Commands, Request, check_request, request_fields
from raytrain.errors import INTERRUPTED, RecipeError, TrainingError
from raytrain.launch.jobs.job import (
    Job,
    JobLog,
    describe_outcome,
    new_id,
    run_location,
    uploaded_files,
)
from raytrain.provenance import refuse_code
from raytrain.recipe import read_toml
from raytrain.terminal import format_mib, printable, printable_line

if TYPE_CHECKING:
    from raytrain.launch.jobs.client import JobServer
    from raytrain.launch.jobs.storage import RunSource
    from raytrain.launch.jobs.upload import Upload

DashboardAddress = Annotated[
    str | None,
    typer.Option(metavar="URL", help="The cluster's dashboard [default: $RAY_API_SERVER_ADDRESS, or on this machine]."),
]
JobName = Annotated[str, typer.Argument(metavar="JOB")]
Detach = Annotated[bool, typer.Option("--detach", "--no-follow", help="Return once the job is submitted.")]
WithCode = Annotated[bool, typer.Option("--with-code", help="Upload this machine's raytrain, and use it there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the files that the job would upload; submit nothing.")]
TrustJob = Annotated[bool, typer.Option("--trust", help="Run the code that the job's arguments name.")]
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Where to leave the run: a folder that the cluster's machines share, or s3://bucket/runs "
        "[default: the disk of the cluster's head].",
    ),
]
SHOWN_NAMES = 10

jobs_app = typer.Typer(
    invoke_without_command=True,
    no_args_is_help=False,
    rich_markup_mode="markdown",
    suggest_commands=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def add_job_commands(commands: Commands) -> None:
    """Add the subcommands to the command."""
    commands.app.add_typer(jobs_app, name="jobs")
    commands.app.command(name="fetch")(fetch_job)
    _add_submit(commands)
    _add_resume(commands)


def _add_submit(commands: Commands) -> None:
    @commands.app.command(context_settings={"allow_interspersed_args": False})
    def submit(
        words: Annotated[list[str], typer.Argument(metavar="-- train RECIPE [FIELD=VALUE]...")],
        address: DashboardAddress = None,
        storage: Storage = None,
        name: Annotated[str | None, typer.Option(help="Begins the job's name [default: that of the recipe].")] = None,
        detach: Detach = False,
        with_code: WithCode = False,
        *,
        dry_run: DryRun = False,
    ) -> int:
        """Run a recipe as a Ray job, stream its log, and return its exit status.

        The current folder is uploaded, without runs/, .venv/, .git/, what .gitignore names, links out of it,
        and what may hold secrets: .env, .ssh, *.pem and the like.
        """
        request = check_request(commands, words)
        if request.resume and request.out is None:
            raise RecipeError("--resume: raytrain jobs resume JOB goes on with a run that is on the cluster")
        job = new_id(name or request.name)
        run, store = run_location(job, request.out, storage)
        if dry_run:
            return _show_upload(request.upload)
        words_there = (*request.words, "--resume") if request.resume else request.words
        return _start(_server(address), Job(job, words_there, run, store, with_code), request, detach=detach)


def _add_resume(commands: Commands) -> None:
    @jobs_app.command()
    def resume(
        job: JobName,
        more: Annotated[list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...")] = None,
        address: DashboardAddress = None,
        detach: Detach = False,
        with_code: WithCode = False,
        trust: TrustJob = False,
    ) -> int:
        """Resume a job's run on the cluster from its newest complete checkpoint, as a new job."""
        server = _server(address)
        old = server.job(job)
        words = [word for word in old.words if word not in ("--resume", "--trust")]
        if not trust:
            refuse_code(request_fields(commands, words), f"{job} may be anybody's job")
        request = check_request(commands, [*words, *(more or []), *(["--trust"] if trust else [])])
        name = new_id(old.id.rpartition("-")[0])
        store = f"{old.store.rpartition('/')[0]}/{name}" if old.store else ""
        new = Job(name, (*request.words, "--resume"), old.run, store, with_code or old.with_code)
        return _start(server, new, request, detach=detach)


@jobs_app.callback()
def list_jobs(context: typer.Context, address: DashboardAddress = None) -> None:
    """List the jobs of a cluster and their status; or follow, stop or resume one."""
    if context.invoked_subcommand is not None:
        if address is not None:
            raise click.UsageError(f"--address goes behind {context.invoked_subcommand}")
        return
    jobs, odd = _server(address).jobs()
    if odd:
        _say(f"{odd} job(s) of this cluster cannot be read: they are not as raytrain submit, or Ray, makes them")
    if not jobs:
        _say("no job of this cluster was submitted with raytrain submit")
    width = max((len(job.id) for job in jobs), default=0)
    for job in jobs:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started))
        took = f"{(job.ended or time.time()) - job.started:.0f} s"
        print(f"{job.id:<{width}}  {job.status:<9}  {began}  {took:>8}  {printable_line(shlex.join(job.words))}")


@jobs_app.command(name="follow")
def follow_job(job: JobName, address: DashboardAddress = None) -> int:
    """Stream a job's log until it ends, and return its exit status."""
    server = _server(address)
    server.job(job)
    return _follow(server, job)


@jobs_app.command(name="stop")
def stop_job(job: JobName, address: DashboardAddress = None) -> int:
    """Stop a job: it saves a checkpoint and ends."""
    server = _server(address)
    found = server.job(job)
    if found.over:
        _say(f"{job} has ended already: {found.status}")
        return 0
    server.stop(job)
    _say(f"{job} saves and ends")
    while not (found := server.job(job)).over:
        time.sleep(0.5)
    _say(f"{job} has ended: {found.status}")
    _say(f"bring its run here with: {_line(server, 'fetch', job)}")
    return 0


def fetch_job(
    job: Annotated[str, typer.Argument(metavar="JOB")],
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]")] = None,
    address: DashboardAddress = None,
) -> None:
    """Bring a job's run to the folder DIR, by default runs/JOB, and verify it.

    JOB is the name of a job, or the folder or the URL where its run was left.
    """
    from raytrain.launch.jobs import transfer  # noqa: PLC0415 - slow to import

    name = job.rstrip("/").rpartition("/")[2]
    target = folder or Path("runs") / name
    transfer.fetch_run(_stored(job) if "/" in job else _left_by(_server(address), job), target, _say)
    _say(f"the run of {name} is in {target}; each of its files is as it was there")
    raw = read_toml(str(target), [])[0] if (target / "recipe.toml").is_file() else {}
    if there := uploaded_files(raw):
        here = " ".join(f"{field}={file}" for field, file in there.items())
        _say(f"its recipe names files as the job found them; here, add: {here}")


def _stored(place_of_run: str) -> "RunSource":
    """Return the source of a run, by the folder or URL where it is stored."""
    from raytrain.launch.jobs.storage import Folder, Store, check_storage  # noqa: PLC0415 - slow to import

    where = check_storage(place_of_run if "://" in place_of_run else str(Path(place_of_run).absolute()))
    if not where.startswith("/"):
        return Store(where)
    if not Path(where).is_dir():
        raise RecipeError(f"{place_of_run}: there is no such folder on this machine")
    return Folder(Path(where))


def _left_by(server: "JobServer", name: str) -> "RunSource":
    """Return the source of a job's run: a store, a shared folder, or the cluster."""
    from raytrain.launch.jobs.cluster_folder import ClusterFolder  # noqa: PLC0415 - slow to import
    from raytrain.launch.jobs.storage import Folder, Store, check_storage  # noqa: PLC0415

    job = server.job(name)
    if job.store:
        try:
            if (store := Store(check_storage(job.store))).complete():
                return store
        except RecipeError as error:
            _say(f"{error}; looking on the cluster instead")
    if Path(job.run).name == name and (Path(job.run) / "recipe.toml").is_file():  # another's would not be named so
        return Folder(Path(job.run))
    return ClusterFolder(server, job)


def _start(server: "JobServer", job: Job, request: Request, *, detach: bool) -> int:
    server.submit(job, request.upload)
    _say(f"submitted as {job.id}, with {len(request.upload.files)} file(s); its run: {job.store or job.run}")
    _say_withheld(request.upload)
    if detach:
        _say(f"follow it with: {_line(server, 'jobs follow', job.id)}")
        return 0
    return _follow(server, job.id)


def _show_upload(upload: "Upload") -> int:
    """Print the files that a job would upload."""
    for name, size in sorted(upload.files.items()):
        print(f"{size:>12}  {printable_line(name)}")
    _say(f"a job would upload {len(upload.files)} file(s), {format_mib(sum(upload.files.values()))}")
    _say_withheld(upload)
    return 0


def _say_withheld(upload: "Upload") -> None:
    """Print the files that are not uploaded."""
    named = [f"{name} ({why})" for name, why in sorted(upload.withheld.items())]
    more = f", and {len(named) - SHOWN_NAMES} more" if len(named) > SHOWN_NAMES else ""
    if named:
        _say(f"not uploaded: {', '.join(named[:SHOWN_NAMES])}{more}")


def _follow(server: "JobServer", name: str) -> int:
    """Stream a job's log until it ends, print how to fetch its run, and return its exit status.

    Raises:
        TrainingError: the server is gone, or refuses to tell; either way the job was started.
    """
    try:
        job = _looked_on(server, name)
    except RecipeError as error:
        raise TrainingError(str(error)) from error
    _say(f"{name}: {describe_outcome(job) or 'succeeded'}")
    if job.began and job.exit_status != RecipeError.exit_status:  # else there is no run
        if job.exit_status:
            _say(f"go on from its newest checkpoint with: {_line(server, 'jobs resume', name)}")
        _say(f"bring its run here with: {_line(server, 'fetch', name)}")
    if job.exit_status == INTERRUPTED:
        raise SystemExit(INTERRUPTED)
    return job.exit_status


def _looked_on(server: "JobServer", name: str) -> Job:
    """Stream a job's log until it ends, or until Ctrl-C."""
    log, stopping = JobLog(_show), False
    while True:
        try:
            return server.follow(name, log, _say)
        except KeyboardInterrupt:
            if stopping or not _asked_to_stop():
                _say(f"{name} runs on; follow it with: {_line(server, 'jobs follow', name)}")
                _say(f"stop it with: {_line(server, 'jobs stop', name)}")
                raise SystemExit(INTERRUPTED) from None  # quietly: nothing but the looking on was interrupted
            stopping = True
            server.stop(name)
            _say(f"{name} saves and ends; Ctrl-C to look no longer")


def _asked_to_stop() -> bool:
    """Ask, on a terminal, whether to stop the job."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        answer = click.prompt(
            "\nstop the job, or leave it running? [s/L]", default="L", show_default=False, prompt_suffix=" ", err=True
        )
    except click.Abort:
        return False
    return str(answer).strip().lower() in ("s", "stop")


def _line(server: "JobServer", verb: str, job: str) -> str:
    """Return a command line that the user can repeat."""
    from raytrain.launch.jobs.client import address_of  # noqa: PLC0415 - slow to import

    address = [] if server.address == address_of(None) else ["--address", server.address]
    return shlex.join(["raytrain", *verb.split(), job, *address])


def _server(address: str | None) -> "JobServer":
    from raytrain.launch.jobs.client import JobServer, address_of, exposes_token  # noqa: PLC0415 - slow to import

    url = address_of(address)
    if exposes_token(url):
        _say(f"the token goes to {url} as anybody on the way can read it; use https://, or a tunnel to this machine")
    return JobServer(url)


def _show(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(printable(text), markup=False)
