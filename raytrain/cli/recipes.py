"""Subcommands about recipes: explain, copy and completion."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from raytrain.cli.completion import SCRIPTS, complete
from raytrain.errors import RecipeError
from raytrain.files import write_atomic
from raytrain.kinds import load_kinds
from raytrain.reference import RecipeField, explain_field, reference_page
from raytrain.registry import suggest


def add_recipe_commands(app: typer.Typer) -> None:
    """Add the subcommands to the command."""
    app.command(name="explain")(explain)
    app.command(name="copy")(copy_recipe)

    @app.command(name="completion", context_settings={"ignore_unknown_options": True})
    def completion(
        shell: Annotated[str, typer.Argument(metavar="bash|zsh")],
        words: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    ) -> None:
        """Print the tab completion of a shell; to use it: eval "$(raytrain completion bash)"."""
        if shell not in SCRIPTS:
            raise RecipeError(f"SHELL: no completion for {shell!r}; {suggest(shell, SCRIPTS)}")
        print(SCRIPTS[shell] if words is None else "\n".join(complete(app, words, shell)))


def explain(
    field: Annotated[str | None, typer.Argument(metavar="FIELD")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Print all fields, as a page of Markdown.")] = False,
) -> None:
    """Explain a field of recipes: its type, default and meaning; names of other libraries are known, as max_steps."""
    if everything:
        print(reference_page(load_kinds()), end="")
        return
    if field is None:
        raise RecipeError("FIELD: expected the name of a field, as in raytrain explain optimizer.lr; or --all")
    console = Console(highlight=False, soft_wrap=True)
    for kind, found in explain_field(field.partition("=")[0]):
        console.print(_explained(kind, found), markup=False)


def _explained(kind: str, field: RecipeField) -> str:
    where = f"{kind}; with {field.owner}" if field.owner else kind
    return f"{field.name} ({where})\n  type: {field.type}\n  default: {field.default}\n  {field.meaning}"


def copy_recipe(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE")],
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]")] = None,
) -> None:
    """Copy a shipped recipe to FILE, by default RECIPE.toml in the current folder, to edit it."""
    shipped = {path.stem: (name, path) for name, kind in load_kinds().items() for path in kind.shipped()}
    if recipe not in shipped:
        raise RecipeError(f"RECIPE: {recipe!r} is not a shipped recipe; {suggest(recipe, shipped)}")
    kind, source = shipped[recipe]
    target = file or Path(f"{recipe}.toml")
    target = target / f"{recipe}.toml" if target.is_dir() else target
    if target.exists():
        raise RecipeError(f"FILE: {target} exists; name another file")
    try:
        write_atomic(target, source.read_bytes())
    except OSError as error:
        raise RecipeError(f"FILE: cannot write {target}: {error.strerror}") from error
    print(f"edit {target}, then: raytrain {kind} {target}")
