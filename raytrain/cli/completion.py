"""Tab completion of verbs, recipes, fields and their values, for bash and zsh."""

from collections.abc import Iterator, Sequence

import click
import typer

from raytrain.kinds import kind_entry_points, load_kind, load_kinds
from raytrain.reference import recipe_fields

BASH = """_raytrain() {
  local IFS=$'\n'
  COMPREPLY=($(raytrain completion bash -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -o nospace -F _raytrain raytrain"""
ZSH = f"autoload -Uz bashcompinit && bashcompinit\n{BASH.replace('completion bash', 'completion zsh')}"
SCRIPTS = {"bash": BASH, "zsh": ZSH}


def complete(app: typer.Typer, words: Sequence[str], shell: str) -> list[str]:
    """Return how the last of the words after `raytrain` can go on.

    Args:
        app: the command.
        words: as the shell divides them; for bash "a=b" is three, of which it completes the last.
        shell: "bash" or "zsh".
    """
    *before, last = "\0".join(words).replace("\0=\0", "=").replace("\0=", "=").split("\0")
    field, equals, _ = last.partition("=")
    candidates = [f"{field}={value}" for value in _values(before, field)] if equals else _words(app, before)
    found = sorted({each for each in candidates if each.startswith(last)})
    return [each.partition("=")[2] for each in found] if equals and shell == "bash" else found


def _words(app: typer.Typer, before: Sequence[str]) -> Iterator[str]:
    """Yield subcommands, then recipes or tables, then fields."""
    group = typer.main.get_command(app)
    if not before and isinstance(group, click.Group):
        yield from (f"{name} " for name, command in group.commands.items() if not command.hidden)
        return
    verb, kinds = before[0] if before else "", load_kinds()
    running = [verb] if verb in kinds else list(kinds) if verb in ("check", "copy") else []
    if len(before) == 1 and verb == "list":
        yield from (f"{title} " for kind in kinds.values() for title in ("recipes", *kind.tables))
    elif len(before) == 1 and verb == "explain":
        yield from (field.name for field in recipe_fields(kinds["train"]))
    elif len(before) == 1:
        yield from (f"{file.stem} " for name in running for file in kinds[name].shipped())
    elif verb != "copy":
        yield from (f"{field.name}=" for field in recipe_fields(kinds[verb if verb in kinds else "train"]))


def _values(before: Sequence[str], field: str) -> Iterator[str]:
    """Yield the values that a field can take, if they are listed."""
    verb = before[0] if before else ""
    kind = verb if verb in kind_entry_points() else "train"
    for found in recipe_fields(load_kind(kind)):
        if found.name in (field, f"{field}.name"):
            yield from (f"{choice} " for choice in found.choices)
