"""The command `raytrain`.

Exit status: 0 done, 1 the run failed, 2 the recipe or an argument is wrong and nothing was started, 130 interrupted.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import click
import tomli_w
import typer
from rich.console import Console
from rich.table import Table

from raytrain.api import run_recipe
from raytrain.cli.jobs import add_job_commands
from raytrain.cli.recipes import add_recipe_commands
from raytrain.cli.request import Commands
from raytrain.errors import INTERRUPTED, RaytrainError, RecipeError
from raytrain.kinds import kind_entry_points, load_kind, load_kinds
from raytrain.overrides import parse_overrides
from raytrain.reading import model_loader, parse_recipe, read_recipe, recipe_of_run
from raytrain.recipe import Recipe, dotted_fields
from raytrain.registry import resolve, suggest, summary
from raytrain.run.listing import list_runs
from raytrain.terminal import format_time, printable, printable_line

RECIPES = "recipes"
FILE_COLUMNS = 200
"""Width of a table that is not printed on a terminal."""

app = typer.Typer(
    help="Train neural networks on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    suggest_commands=False,  # click does
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Help of arguments is written here, because click 8.5 forgets what typer 0.20 tells it of them.
RECIPE_HELP = (
    "RECIPE is a file, a shipped recipe (raytrain list recipes), a run's folder, or a task (of a search: a space) as "
    "module:attribute. FIELD=VALUE is short for --set FIELD=VALUE."
)
RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE")]
FieldArguments = Annotated[list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...")]
SetOptions = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, as in --set optimizer.lr=1e-3."),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_ADDRESS",
        help="A Ray cluster: auto or HOST:PORT of one that runs, or local for one of this machine that ends with the "
        "command [default: this machine, without Ray where that does].",
    ),
]
TrustOption = Annotated[bool, typer.Option("--trust", help="Run the code that the recipe of a fetched run names.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"raytrain {version('raytrain')}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command, and turn every error into one message and an exit status."""
    sys.path.append(os.getcwd())  # so that my_module:my_task is found, and a torch.py that lies about is not
    signal.signal(signal.SIGTERM, _as_interrupt)
    _add_kinds()
    try:
        status = app(standalone_mode=False)
        if status == INTERRUPTED:
            _complain("interrupted", status)
    except RaytrainError as error:
        status = _complain(str(error), error.exit_status)
    except KeyboardInterrupt:
        status = _complain("interrupted", INTERRUPTED)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    sys.exit(status)


@app.callback()
def about(
    version: Annotated[  # noqa: ARG001 - the callback prints it
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Train neural networks on a Ray cluster."""


@app.command(name="check")
def check_recipe(
    recipe: RecipeArgument,
    more: FieldArguments = None,
    changes: SetOptions = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="Read the data, build the model and take one step in this process.")
    ] = False,
    *,
    trust: TrustOption = False,
) -> None:
    """Print the resolved recipe, and where each value comes from; start nothing.

    With --dry print instead what one step takes: parameters, shapes, seconds and memory.
    Modules that the recipe names as task, source, optimizer, adapter or synchroniser are imported.
    """
    raw, origin = read_recipe(recipe, None, trust)
    overrides = parse_overrides([*(changes or []), *(more or [])])
    resolved = parse_recipe(raw, overrides)
    if dry:
        _print_dry_run(resolved)
        return
    given = dict(dotted_fields(raw))
    for field, value in dotted_fields(resolved.to_dict()):
        spellings = {field, field.removesuffix(".name")}  # `optimizer=lion` is short for `optimizer.name=lion`
        changed = any(name in spellings or name.startswith(f"{field}.") for name in overrides)  # an entry of a list
        source = "--set" if changed else origin.name if spellings & given.keys() else "default"
        line = f"{field} = {tomli_w.dumps({'x': value}).removeprefix('x = ').strip()}"
        print(f"{' '.join(line.split()):<48}  # {source}")
    if hook := load_kind(raw["kind"]).check:
        print("", *resolve({}, hook, "kind")(resolved), sep="\n")


def _print_dry_run(recipe: Recipe) -> None:
    """Print the lines of a dry run as they come.

    Raises:
        RecipeError: recipes of this kind have none.
    """
    hook = load_kind(recipe.kind).dry_run
    if not hook:
        raise RecipeError(
            f"--dry: expected a recipe of the kind train; got one of {recipe.kind}; check the recipe that it trains"
        )
    for line in resolve({}, hook, "kind")(recipe):
        print(line, flush=True)


@app.command(name="runs")
def print_runs(folder: Annotated[Path, typer.Argument(metavar="[FOLDER]")] = Path("runs")) -> None:
    """List the runs in FOLDER, by default runs, the newest first: status, best metric and its step."""
    grid = Table(box=None, padding=(0, 2), header_style="")
    for heading in ("run", "kind", "status", "best", "step", "started"):
        grid.add_column(heading, overflow="fold")
    for run in list_runs(folder):
        value, started = run.best.get("value"), format_time(run.started).rpartition(":")[0]
        best = f"{printable_line(run.best['metric'])} {value:.4f}" if value is not None else ""
        grid.add_row(str(run.folder), run.kind, run.status, best, str(run.best.get("step", "")), started)
    Console(highlight=False, width=None if sys.stdout.isatty() else FILE_COLUMNS).print(grid)


@app.command(name="list")
def list_tables(what: Annotated[str | None, typer.Argument(metavar="[TABLE]")] = None) -> None:
    """List the names that a recipe can use, with a line each; TABLE is recipes, tasks, optimizers, and so on."""
    broken: list[RecipeError] = []
    shown: dict[str, dict[str, str]] = {}
    for name, kind in load_kinds(broken.append).items():
        heading = f"{name}: {{}}"
        if what in (None, RECIPES) and kind.shipped():
            shown[heading.format(RECIPES)] = {file.stem: _first_comment(file) for file in kind.shipped()}
        for title in kind.tables if what is None else kind.tables.keys() & {what}:
            remarks = resolve({}, kind.remarks[title], title)() if what and title in kind.remarks else {}
            shown[heading.format(title)] = _lines(kind.table(title), remarks)
    if not shown:
        known = [RECIPES, *(title for kind in load_kinds().values() for title in kind.tables)]
        raise RecipeError(f"{what!r} is not a table; {suggest(what or '', known)}")
    for heading, lines in shown.items():
        grid = Table(title=heading, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, line in lines.items():
            grid.add_row(name, line)
        Console().print(grid)
    for error in broken:
        _complain(str(error), 0)


def _lines(table: Mapping[str, str], remarks: Mapping[str, str]) -> dict[str, str]:
    """Return a line for each name of a table."""
    return {name: " ".join(filter(None, [summary(table, name), remarks.get(name, "")])) for name in table}


@app.command(name="evaluate")
def evaluate_run(
    run: RunArgument, more: FieldArguments = None, changes: SetOptions = None, trust: TrustOption = False
) -> None:
    """Evaluate the best checkpoint of the run in the folder RUN on held-out data, and print the metrics as JSON."""
    trained = resolve({}, model_loader(run, trust=trust), "kind")(
        run, parse_overrides([*(changes or []), *(more or [])])
    )
    print(json.dumps(trained.evaluate(), indent=2))


@app.command(name="predict")
def predict_run(
    run: RunArgument,
    source: Annotated[Path, typer.Option("--input", help="What to predict on.")],
    target: Annotated[Path, typer.Option("--output", help="Where a line of JSON goes for each example.")],
    more: FieldArguments = None,
    changes: SetOptions = None,
    address: RayAddress = None,
    *,
    trust: TrustOption = False,
) -> None:
    """Predict each example of a file with the best checkpoint of the run in the folder RUN."""
    overrides = parse_overrides([*(changes or []), *(more or [])])
    load = model_loader(run, trust=trust)
    from raytrain.launch.predict import predict_file  # noqa: PLC0415 - slow to import

    count = predict_file(load, run, overrides, source, target, address or None)
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"{count} predictions in {target}", markup=False)


@app.command(name="export")
def export_run(
    run: RunArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    more: FieldArguments = None,
    changes: SetOptions = None,
    trust: TrustOption = False,
) -> None:
    """Write the best model of the run in the folder RUN to DIR, as Hugging Face's `from_pretrained` reads it."""
    load = resolve({}, model_loader(run, trust=trust), "kind")
    load(run, parse_overrides([*(changes or []), *(more or [])])).export(folder)


@app.command(name="report")
def report_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...")],
    output: Annotated[
        Path | None, typer.Option(help="The page to write [default: report.html in the first RUN].")
    ] = None,
) -> None:
    """Write the metrics of runs so far as one HTML page that works offline; several runs are compared."""
    from raytrain.run.report.runs import report_on  # noqa: PLC0415 - slow to import

    page = output or runs[0] / "report.html"
    recorded = {str(run): load_kind(recipe_of_run(run)["kind"]).panels for run in runs}
    report_on({run: resolve({}, panels, "kind") for run, panels in recorded.items() if panels}, page)
    print(page)


@cache
def _add_kinds() -> None:
    """Add a subcommand for each installed kind; one that cannot be loaded says so when it is used."""
    kinds = load_kinds()
    for name in kind_entry_points():
        has_apps = name in kinds and bool(kinds[name].app)
        app.command(name, help=f"Run a recipe of the kind {name}.\n\n{RECIPE_HELP}")(_runner(name, has_apps))
    add_recipe_commands(app)
    add_job_commands(Commands(app, read_recipe, parse_recipe))


def _runner(verb: str, has_apps: bool) -> Callable[..., int]:
    """Return the subcommand that runs recipes of a kind, and apps if it has them."""

    def command(
        recipe: RecipeArgument,
        more: FieldArguments = None,
        changes: SetOptions = None,
        out: Annotated[Path | None, typer.Option(help="The run's folder [default: runs/NAME-TIME].")] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Continue the run in RECIPE's folder or --out.")] = False,
        address: RayAddress = None,
        *,
        whole_app: Annotated[
            bool, typer.Option("--app", hidden=not has_apps, help="RECIPE is the folder of an app, run as it is.")
        ] = False,
        trust: TrustOption = False,
    ) -> int:
        overrides = parse_overrides([*(changes or []), *(more or [])])
        if whole_app:
            if out or resume:
                raise RecipeError("--app: expected neither --out nor --resume: an app writes its files where it says")
            _run_app(verb, Path(recipe), overrides, address or None)
            return 0
        raw, _ = read_recipe(recipe, verb, trust)
        resolved = parse_recipe(raw, overrides)
        if resume and out is None and not Path(recipe).is_dir():
            raise RecipeError(f"--resume: say which run, as in raytrain {verb} runs/NAME-TIME --resume")
        result = run_recipe(resolved, recipe, out, resume=resume, address=address or None)
        return {"interrupted": INTERRUPTED, "failed": 1}.get(result.status, 0)

    return command


def _run_app(verb: str, folder: Path, overrides: dict[str, Any], address: str | None) -> None:
    """Run the app in a folder.

    Raises:
        RecipeError: the kind has no apps, or this is none.
        TrainingError: it failed.
    """
    run = load_kind(verb).app
    if not run:
        raise RecipeError(f"--app: raytrain {verb} runs recipes, and no apps")
    resolve({}, run, "kind")(folder, overrides, address)


def _first_comment(file: Path) -> str:
    first = file.read_text().partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _complain(message: str, status: int) -> int:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"raytrain: {printable(message)}", markup=False)
    return status


def _as_interrupt(*_: object) -> NoReturn:
    """Handle SIGTERM (of a job server, or Kubernetes) as Ctrl-C."""
    raise KeyboardInterrupt
