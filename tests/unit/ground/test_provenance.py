"""Code that a fetched run's recipe, or another's job, names is run only if the user says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain.launch.jobs.client import JobServer
from raytrain.launch.jobs.job import Job
from raytrain.launch.jobs.storage import Folder
from raytrain.launch.jobs.transfer import fetch_run
from raytrain.provenance import MARKER, find_code, refuse_code

PLANTED = "from pathlib import Path\nPath('planted').touch()\nfrom raytrain.testing import tiny\n"

keys = st.text("xyz", min_size=1, max_size=2)
values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text("ab.: ", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@given(values, st.lists(keys | st.integers(0, 2), max_size=4))
def test_code_is_found_wherever_it_is_named(rest: Any, path: list[str | int]) -> None:
    raw: Any = "mine.deep:Thing.made"
    for key in reversed(path):
        raw = {"rest": rest, key: raw} if isinstance(key, str) else [*([rest] * key), raw]
    found = dict(find_code(raw))
    assert found[".".join(map(str, path))] == "mine.deep:Thing.made"
    others = {value for value in found.values() if value != "mine.deep:Thing.made"}
    assert all(":" in value and " " not in value for value in others)


@pytest.mark.parametrize("value", ["digits", "s3://bucket/x", "/a:b", "a: b", "12:30", ":x", "x:", "in(a, b)", "C:\\x"])
def test_what_cannot_be_imported_is_no_code(value: str) -> None:
    refuse_code({"task": {"path": value}}, "x")


@pytest.fixture
def fetched(workplace: Path) -> Path:
    """A run with code of its own, fetched from another's folder."""
    (workplace / "planted_task.py").write_text(PLANTED)
    (workplace / "theirs").mkdir()
    (workplace / "theirs" / "recipe.toml").write_text('kind = "train"\n[task]\nname = "planted_task:tiny"\n')
    (workplace / "theirs" / "trials").mkdir()
    (workplace / "theirs" / "trials" / "recipe.toml").write_text('[task]\nname = "planted_task:tiny"\n')
    fetch_run(Folder(workplace / "theirs"), workplace / "run", lambda _: None)
    return workplace / "run"


VERBS = [
    ["check", "run"],
    ["check", "run/recipe.toml"],
    ["check", "run/trials"],
    ["evaluate", "run"],
    ["export", "run", "out"],
    ["predict", "run", "--input", "x", "--output", "y"],
    ["train", "run", "--resume", "steps=2"],
    ["train", "run/recipe.toml", "--out", "again"],
    ["submit", "--dry-run", "--", "train", "run"],
]


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_a_fetched_runs_code_needs_trust(
    words: list[str], fetched: Path, workplace: Path, raytrain: Callable[..., Any]
) -> None:
    ended = raytrain(*words)
    assert (ended.status, ended.err) == (
        2,
        f"raytrain: {fetched} was fetched from {workplace / 'theirs'}, and its recipe is code: task.name names "
        "planted_task:tiny. Read that, and add --trust to run it\n",
    )
    assert not (workplace / "planted").exists()


@pytest.mark.parametrize(
    "words", [["check", "run"], ["evaluate", "run"], ["submit", "--dry-run", "--", "train", "run"]]
)
def test_who_trusts_it_runs_it(words: list[str], fetched: Path, workplace: Path, raytrain: Callable[..., Any]) -> None:
    ended = raytrain(*words, "--trust")
    assert ended.status == (1 if words[0] == "evaluate" else 0), ended.err  # there is no checkpoint
    assert (workplace / "planted").exists()


def test_a_run_of_ones_own_and_one_without_code_need_none(
    fetched: Path, workplace: Path, raytrain: Callable[..., Any]
) -> None:
    assert raytrain("check", "theirs").status == 0
    (fetched / "recipe.toml").write_text('task = "digits"\n')
    assert raytrain("check", "run", 'callbacks=["mine:nothing"]').err.startswith("raytrain: callbacks: cannot import")
    assert raytrain("check", "run").status == 0


def test_a_copy_that_is_served_again_is_marked_again(fetched: Path, workplace: Path) -> None:
    fetch_run(Folder(fetched), workplace / "other", lambda _: None)
    assert (workplace / "other" / MARKER).read_text() == f"{fetched}\n"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train", "planted_task:tiny"], "RECIPE names planted_task:tiny"),
        (["train", "digits", "--set", 'callbacks=["planted_task:tiny"]'], "callbacks.0 names planted_task:tiny"),
        (["train", "digits", "task=planted_task:tiny", "--trust"], "task names planted_task:tiny"),
    ],
)
def test_the_words_of_a_job_are_of_anybody(
    words: list[str], named: str, workplace: Path, raytrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "planted_task.py").write_text(PLANTED)
    submitted: list[Job] = []
    monkeypatch.setattr(JobServer, "__init__", lambda server, address: setattr(server, "address", address))
    monkeypatch.setattr(JobServer, "job", lambda server, name: Job(name, tuple(words), "/run"))
    monkeypatch.setattr(JobServer, "submit", lambda server, job, upload: submitted.append(job))
    ended = raytrain("jobs", "resume", "x-1", "--detach")
    assert (ended.status, ended.err) == (
        2,
        f"raytrain: x-1 may be anybody's job, and its recipe is code: {named}. Read that, and add --trust to run it\n",
    )
    assert not (workplace / "planted").exists()
    assert submitted == []


def test_ones_own_recipe_file_is_trusted_and_what_was_trusted_there_stays_so(
    workplace: Path, raytrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "planted_task.py").write_text(PLANTED)
    (workplace / "mine.toml").write_text('task = "planted_task:tiny"\n')
    submitted: list[Job] = []
    monkeypatch.setattr(JobServer, "__init__", lambda server, address: setattr(server, "address", address))
    monkeypatch.setattr(JobServer, "job", lambda server, name: Job(name, ("train", "mine.toml"), "/run"))
    monkeypatch.setattr(JobServer, "submit", lambda server, job, upload: submitted.append(job))
    assert raytrain("jobs", "resume", "x-1", "--detach").status == 0
    assert raytrain("jobs", "resume", "x-1", "--detach", "--trust", "steps=2").status == 0
    assert [job.words for job in submitted] == [
        ("train", "mine.toml", "--resume"),
        ("train", "mine.toml", "steps=2", "--trust", "--resume"),
    ]


def test_what_a_job_would_take_along_is_listed(workplace: Path, raytrain: Callable[..., Any]) -> None:
    (workplace / "mine.py").write_text("12")
    (workplace / ".env").write_text("KEY=secret")
    (workplace / "link").symlink_to("/etc")
    ended = raytrain("submit", "--dry-run", "--", "train", "digits")
    assert (ended.status, ended.out) == (0, "           2  mine.py\n")
    assert ended.err.splitlines() == [
        "a job would upload 1 file(s), 0.0 MiB",
        "not uploaded: .env (may hold secrets), link (a link out of the folder)",
    ]
