"""Arguments of a job, checked on the user's machine as the command will read them on the cluster."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import typer

from raytrain.errors import RecipeError
from raytrain.kinds import kind_entry_points, load_kinds
from raytrain.launch.jobs.job import check_upload, check_uploaded
from raytrain.overrides import apply_overrides, parse_overrides
from raytrain.recipe import Recipe, dotted_fields
from raytrain.registry import suggest

if TYPE_CHECKING:
    from raytrain.launch.jobs.upload import Upload


@dataclass(frozen=True, slots=True)
class Commands:
    """The command, for subcommands about jobs.

    Attributes:
        app: with the subcommands that run recipes.
        read: (RECIPE, kind, whether a fetched recipe may name code) -> the recipe's data, and its file.
        parse: (data, overrides) -> the recipe.
    """

    app: typer.Typer
    read: Callable[[str, str | None, bool], tuple[dict[str, Any], Path]]
    parse: Callable[[dict[str, Any], dict[str, Any]], Recipe]


@dataclass(frozen=True, slots=True)
class Request:
    """Checked arguments of a job.

    Attributes:
        words: subcommand, recipe and overrides.
        name: of the recipe.
        resume: whether --resume is given.
        out: --out, if it is given.
        upload: files for the job.
    """

    words: tuple[str, ...]
    name: str
    resume: bool
    out: Path | None
    upload: "Upload"


def check_request(commands: Commands, words: list[str]) -> Request:
    """Check the arguments of a job as the command will, and start nothing.

    Raises:
        RecipeError: they are wrong, or name files that are not uploaded.
        click.UsageError: they do not fit the subcommand.
    """
    verb, given = _read_words(commands, words)
    raw, file = commands.read(given["recipe"], verb, given["trust"])
    changes = [*(given["changes"] or []), *(given["more"] or [])]
    recipe = commands.parse(raw, parse_overrides(changes))
    from raytrain.launch.jobs.upload import upload_limit, upload_of  # noqa: PLC0415 - slow to import

    folder = Path.cwd()
    _check_relative(apply_overrides(raw, parse_overrides(changes)), folder)
    source, needed = given["recipe"], dict(_named_files(recipe, folder))
    if file.is_file() and not any(file in kind.shipped() for kind in load_kinds().values()):
        needed[source] = Path(os.path.abspath(file))
        inside = Path(os.path.abspath(source))
        source = str(inside.relative_to(folder)) if inside.is_relative_to(folder) else source
    upload = upload_of(folder)
    check_upload(upload.files, upload_limit(), folder)
    check_uploaded(needed, upload.files, folder)
    out = Path(given["out"]) if given["out"] is not None else None
    trusted = ("--trust",) if given["trust"] else ()
    return Request((verb, source, *changes, *trusted), recipe.name, given["resume"], out, upload)


def _read_words(commands: Commands, words: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the subcommand of a job and its parameters, as the command will read them.

    Raises:
        RecipeError: there is no such subcommand, or it is given an address or an app.
        click.UsageError: the arguments do not fit it.
    """
    kinds = kind_entry_points()
    verb, *rest = words or [""]
    group = typer.main.get_command(commands.app)
    if verb not in kinds or not isinstance(group, click.Group):
        raise RecipeError(
            f"{verb!r} does not run a recipe, as in raytrain submit -- train digits; {suggest(verb, kinds)}"
        )
    context = group.commands[verb].make_context(f"raytrain {verb}", rest)
    if context.get_parameter_source("address") is click.core.ParameterSource.COMMANDLINE:
        raise RecipeError("--address: it goes before the words of the job, which runs where it is submitted to")
    if context.params["whole_app"]:
        raise RecipeError("--app: expected a recipe, which is what a job runs")
    return verb, context.params


def request_fields(commands: Commands, words: list[str]) -> dict[str, Any]:
    """Return the recipe fields in the arguments of a job, without those of a recipe file on this machine."""
    _, given = _read_words(commands, words)
    changes = parse_overrides([*(given["changes"] or []), *(given["more"] or [])])
    return apply_overrides({} if Path(given["recipe"]).is_file() else {"RECIPE": given["recipe"]}, changes)


def _check_relative(raw: Mapping[str, Any], folder: Path) -> None:
    """Check that uploaded files are named by relative paths.

    Raises:
        RecipeError: one is not.
    """
    for field, value in dotted_fields(raw):
        if isinstance(value, str) and value.startswith("/") and Path(value).is_relative_to(folder):
            raise RecipeError(
                f"{field}: {value} is in the current folder, which the job finds elsewhere; name it relative to it, "
                f"as {str(Path(value).relative_to(folder))!r}"
            )


def _named_files(recipe: Recipe, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (field, path) for each path of a recipe in the current folder."""
    for field, value in dotted_fields(recipe.model_dump()):
        if isinstance(value, Path) and value.is_relative_to(folder):
            yield f"{field}: {value.relative_to(folder)}", value
