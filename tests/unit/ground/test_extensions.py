"""What a recipe names to be called later: wrong things are refused, and nothing is run to find that out."""

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytrain.errors import RecipeError
from raytrain.extensions import ExtensionPoint
from raytrain.run.loggers import check_logger
from raytrain.training.build import resolve_recipe
from raytrain.training.recipe import TrainRecipe

FUNCTION = ExtensionPoint("field", "a function", arguments=2)
CLASS = ExtensionPoint("field", "a class", arguments=2, methods=("write",))

PLANTED = """
from pathlib import Path
Path("planted").touch()

def after_step(replica):
    pass

def shape(done, decay):
    return 1.0

class Logger:
    def __init__(self, folder, step): ...
    def write(self, row): ...
    def close(self, failed): ...
"""


def recipe(**changes: Any) -> TrainRecipe:
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    return TrainRecipe.parse({"kind": "train", "task": "raytrain.testing:tiny"}).with_overrides(fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log__loggers": ["shutil:rmtree"]}, "log.loggers: 'shutil' is a module of Python itself; name one of yours; "
         "got 'shut"),
        ({"schedule__name": "os:_exit"}, "schedule.name: 'os' is a module of Python itself; name one of yours; got "),
        ({"callbacks": ["builtins:exec"]}, "callbacks: 'builtins' is a module of Python itself; name one of yours; "),
        ({"task__source": "subprocess:call"}, "task.source.name: 'subprocess' is a module of Python itself; name one"),
        ({"log__loggers": ["mine:function"]}, "log.loggers: expected a class that is made with (the run's folder, a "
         "step) and "
         "has write and close; got 'mine:function', which is not a class"),
        ({"log__loggers": ["mine:Half"]}, "log.loggers: expected a class that is made with (the run's folder, a step) "
         "and has "
         "write and close; got 'mine:Half', which has no close"),
        ({"schedule__name": "mine:function"}, "schedule.name: expected a function (done, decay) -> height of the "
         "learning rate; got 'mine:function', which takes (path)"),
        ({"callbacks": ["mine:two"]}, "callbacks: expected a function of the replica, called after every step; got "
         "'mine:two', which takes (one, other)"),
        ({"callbacks": ["mine:tow"]}, "callbacks: 'mine' has no 'tow'; did you mean two? known: Half, function, two"),
        ({"callbacks": ["nowhere.at.all:x"]}, "callbacks: cannot import 'nowhere.at.all': ModuleNotFoundError: No mod"),
        ({"callbacks": ["broken:x"]}, "callbacks: cannot import 'broken': SyntaxError: invalid syntax (broken.py, lin"),
        ({"callbacks": ["mine"]}, "callbacks: expected module:attribute, as in mine:task; got 'mine'"),
        ({"callbacks": ["mine:"]}, "callbacks: expected module:attribute, as in mine:task; got 'mine:'"),
        ({"callbacks": ["../mine:two"]}, "callbacks: expected module:attribute, as in mine:task; got '../mine:two'"),
    ],
)  # fmt: skip
def test_what_is_of_another_kind_is_refused(workplace: Path, changes: dict[str, Any], message: str) -> None:
    (workplace / "mine.py").write_text(
        "def function(path): ...\ndef two(one, other): ...\nclass Half:\n    def write(self, row): ...\n"
    )
    (workplace / "broken.py").write_text("def x(:\n")
    with pytest.raises(RecipeError) as caught:
        recipe(**changes)
    assert str(caught.value).startswith(message)


def test_a_recipe_is_checked_without_running_what_it_names(workplace: Path) -> None:
    (workplace / "inside").mkdir()
    for name in ("mine.py", "inside/__init__.py", "inside/deep.py"):
        (workplace / name).write_text(PLANTED)
    for module in ("mine", "inside.deep"):
        recipe(
            callbacks=[f"{module}:after_step"],
            schedule__name=f"{module}:shape",
            log__loggers=[f"{module}:Logger"],
            steps=1,
        )
    assert not (workplace / "planted").exists()
    assert not {"mine", "inside", "inside.deep"} & sys.modules.keys()


def test_what_the_source_does_not_tell_is_refused_before_it_is_called(workplace: Path) -> None:
    (workplace / "mine.py").write_text("def two(one, other): ...\nafter_step = two\nafter_steps = [two]\n")
    wrong = {"after_step": "takes (one, other)", "after_steps": "cannot be called"}
    for name, asked in {name: recipe(callbacks=[f"mine:{name}"]) for name in wrong}.items():
        with pytest.raises(RecipeError, match=rf"^callbacks: expected .*; got 'mine:{name}', which ") as caught:
            resolve_recipe(asked, None)  # type: ignore[arg-type]  # which it does not come to
        assert str(caught.value).endswith(wrong[name])


def test_a_module_that_fills_itself_may_have_any_name(workplace: Path) -> None:
    (workplace / "stars.py").write_text("from mine import *\n")
    (workplace / "lazy.py").write_text("def __getattr__(name): ...\n")
    for module in ("stars", "lazy"):
        recipe(callbacks=[f"{module}:anything"])


parameters = st.builds(
    lambda places, defaults, rest, keyword, required, more: ", ".join(
        [
            *(f"p{place}" + ("=0" if place >= places - defaults else "") for place in range(places)),
            *(["*rest"] if rest else ["*"] if keyword else []),
            *(["key" if required else "key=0"] if keyword else []),
            *(["**more"] if more else []),
        ]
    ),
    *(st.integers(0, 4), st.integers(0, 4), st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parameters, st.sampled_from(["def", "class", "bare class", "function for a class"]), st.booleans())
def test_the_source_and_what_is_imported_are_judged_alike(workplace: Path, taken: str, what: str, method: bool) -> None:
    write = "    def write(self): ...\n" if method else ""
    source = {
        "def": f"def found({taken}): ...\n",
        "class": f"class found:\n    def __init__(self, {taken}): ...\n{write}",
        "bare class": f"class found:\n    x = 0\n{write}",
        "function for a class": f"def found({taken}): ...\n",
    }[what]
    (workplace / "mine.py").write_text(source)
    point = FUNCTION if what == "def" else CLASS
    assert verdict(point.check) == verdict(point.load) or what == "bare class"


def verdict(judge: Any) -> str:
    sys.modules.pop("mine", None)
    try:
        judge({}, "mine:found")
    except RecipeError as error:
        return str(error)
    finally:
        sys.modules.pop("mine", None)
    return ""


def test_loggers_of_ours_are_right() -> None:
    check_logger("tensorboard")
