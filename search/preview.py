"""What `raytrain check` prints of a search below its fields."""

from search.recipe import SearchRecipe
from search.scheduling.segments import Objective
from search.space import parse_dimensions

SHOWN = 8


def search_preview(recipe: SearchRecipe) -> list[str]:
    """Return the dimensions, the total of steps, and what the first members would train with."""
    search = recipe.search
    if hasattr(recipe.base, "steps"):
        total = recipe.total_steps or "as many steps as it takes"
        lines = [f"# {recipe.members} members or trials; of all {total} steps"]
    else:
        lines = [f"# {recipe.members} trials, each a whole run of the kind {recipe.base.kind}"]
    if not isinstance(search.space, str):
        dimensions = parse_dimensions(search.space).items()
        lines += [f"# {name}: {dimension.domain.summary()}" for name, dimension in dimensions]
    first = recipe.scheduler(Objective(search.metric, "lower")).ask(min(SHOWN, recipe.members))
    return lines + [f"# member {work.member} begins with {dict(work.changes)}" for work in first]
