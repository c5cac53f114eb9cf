"""The kind `search`."""

from pathlib import Path

from raytrain.kinds import Kind

KIND = Kind(
    recipe="search.recipe:SearchRecipe",
    run="search.launch.dispatch:dispatch_search",
    recipes=Path(__file__).parent / "recipes",
    load="search.launch.winner:load_winner",
    panels="search.report.panels:search_panels",
    check="search.preview:search_preview",
    tables={
        "searches": "search.tables:SEARCHES",
        "searchers": "search.tables:SEARCHERS",
        "predictors": "search.tables:PREDICTORS",
        "proxies": "search.tables:PROXIES",
        "exploits": "search.tables:EXPLOITS",
        "explores": "search.tables:EXPLORES",
    },
    shorthand="search.space",
    accepts="search.space:is_space_function",
    packages=("raytrain", "search"),
    requires=("optuna", "scikit-learn"),
)
