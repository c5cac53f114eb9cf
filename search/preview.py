"""What `raytrain check` prints of a search below its fields."""

from collections.abc import Mapping
from typing import Any

import tomli_w

from search.pbt.options import PBTOptions
from search.recipe import SearchRecipe
from search.rng import keyed_generator
from search.scheduling.segments import Objective
from search.space import parse_dimensions
from search.space_size import space_size

SHOWN_MEMBERS = 8
SHOWN_SAMPLES = 3


def search_preview(recipe: SearchRecipe) -> list[str]:
    """Return the space, the total of steps, and what the first members would train with."""
    search = recipe.search
    if hasattr(recipe.base, "steps"):
        what = "members of a population" if isinstance(search, PBTOptions) else "trials"
        total = f"{recipe.total_steps:,} steps in all" if recipe.total_steps else "as many steps as it takes"
        lines = [f"# {recipe.members:,} {what}; {total}"]
    else:
        lines = [f"# {recipe.members} trials, each a whole run of the kind {recipe.base.kind}"]
    if isinstance(search.space, str):
        lines += _function_lines(recipe)
    else:
        dimensions = parse_dimensions(search.space).items()
        lines += [f"# {name}: {dimension.domain.summary()}" for name, dimension in dimensions]
    first = recipe.scheduler(Objective(search.metric, "lower")).ask(min(SHOWN_MEMBERS, recipe.members))
    return lines + [f"# member {work.member} begins with {dict(work.changes)}" for work in first]


def _function_lines(recipe: SearchRecipe) -> list[str]:
    space = recipe.space()
    lines = [f"# {recipe.search.space}: {space_size(space)}"]
    for number in range(SHOWN_SAMPLES):
        changes = space.sample(keyed_generator(recipe.seed, "sample", number)).changes
        lines += ["", f"# sample {number + 1}", *_recipe_lines(changes)]
    return [*lines, ""]


def _recipe_lines(changes: Mapping[str, Any]) -> list[str]:
    """Return changes as lines of a recipe, field = value in TOML."""
    values = {field: tomli_w.dumps({"value": value}) for field, value in changes.items()}
    return [f"{field} = {' '.join(text.removeprefix('value = ').split())}" for field, text in values.items()]
