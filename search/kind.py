"""The kind `search`."""

from pathlib import Path

from raytrain.kinds import Kind

KIND = Kind(
    recipe="search.recipe:SearchRecipe",
    run="search.launch.run:run_search",
    recipes=Path(__file__).parent / "recipes",
    load="search.launch.winner:load_winner",
    panels="search.report:search_panels",
    check="search.preview:search_preview",
    tables={
        "searches": "search.scheduling.scheduler:SEARCHES",
        "searchers": "search.searcher:SEARCHERS",
        "exploits": "search.pbt.exploit:EXPLOITS",
        "explores": "search.pbt.explore:EXPLORES",
    },
    packages=("raytrain", "search"),
    requires=("optuna",),
)
