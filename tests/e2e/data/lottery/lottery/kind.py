"""The kind `lottery`."""

from pathlib import Path

from raytrain.kinds import Kind

KIND = Kind(
    recipe="lottery.recipe:LotteryRecipe",
    run="lottery.run:run",
    recipes=Path(__file__).parent / "recipes",
    load="lottery.results:load_winner",
    panels="lottery.results:panels",
    check="lottery.recipe:odds",
    tables={"prizes": "lottery.recipe:PRIZES"},
    packages=("lottery",),
    requires=("lottery",),
)
