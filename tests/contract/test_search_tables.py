"""Every entry of the tables of search, the shipped recipes, and the examples in docstrings and on the page."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

import search
from raytrain.registry import resolve, summary
from search.pbt.exploit import Exploit
from search.pbt.explore import Explore
from search.predictor.predictor import Predictor
from search.recipe import SearchRecipe
from search.scheduling.segments import Objective
from search.searcher import Searcher
from search.tables import EXPLOITS, EXPLORES, PREDICTORS, PROXIES, SEARCHERS, SEARCHES

FOLDER = Path(search.__file__).parent
TABLES = {
    "searches": SEARCHES,
    "searchers": SEARCHERS,
    "predictors": PREDICTORS,
    "proxies": PROXIES,
    "exploits": EXPLOITS,
    "explores": EXPLORES,
}
BASES = {"searchers": Searcher, "predictors": Predictor, "exploits": Exploit, "explores": Explore}


@pytest.mark.parametrize(("title", "name"), [(title, name) for title, table in TABLES.items() for name in table])
def test_every_name_stands_for_something_described(title: str, name: str) -> None:
    table: Mapping[str, str] = TABLES[title]
    assert summary(table, name).endswith(".")
    if title in BASES:
        assert issubclass(resolve(table, name, title), BASES[title])


@pytest.mark.parametrize("file", sorted((FOLDER / "recipes").glob("*.toml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_complete(file: Path) -> None:
    text = file.read_text()
    recipe = SearchRecipe.parse(tomllib.loads(text))
    assert recipe.name == file.stem
    assert text.startswith("# ")
    assert recipe.scheduler(Objective("loss", "lower")).ask(2)


def test_the_example_on_the_page_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    [loop] = [example for example in examples if "print(" in example]
    exec(loop, {})
    score, changes = capsys.readouterr().out.split(" ", 1)
    assert float(score) < 1e-6
    assert changes.startswith("{'lr': ")
