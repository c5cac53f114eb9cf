"""What a job takes along from the current folder, and what stays here."""

import logging
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

from raytrain.launch.jobs.upload import upload_of


def packed(folder: Path) -> set[str]:
    """Return what Ray packs when it is told what to leave out."""
    found: set[str] = set()
    patterns = upload_of(folder).excludes()

    def take(path: Path) -> None:
        if path.is_file():
            found.add(path.relative_to(folder).as_posix())

    _dir_travel(folder, [_get_excludes(folder, patterns)], take, include_gitignore=True, logger=logging.getLogger())
    return found


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("12")


def test_a_job_takes_along_what_git_would(workplace: Path) -> None:
    files = ["mine.py", "data/a.txt", "data/big.bin", "deep/runs/x", "runs/y", ".git/z", ".venv/z", "a/__pycache__/z"]
    write(workplace, *files)
    (workplace / "data" / ".gitignore").write_text("*.bin\n")
    upload = upload_of(workplace)
    assert upload.files == {"mine.py": 2, "data/a.txt": 2, "data/.gitignore": 6, "deep/runs/x": 2}
    assert packed(workplace) == set(upload.files)
    assert upload.withheld == {}
    assert "/raytrain" not in upload.excludes()
    assert "/raytrain" in upload_of(Path(__file__).parents[3]).excludes()


def test_secrets_stay_here_and_are_named(workplace: Path) -> None:
    secrets = [".env", ".env.local", "keys/server.pem", "id_rsa", ".ssh/config", ".aws/credentials", ".netrc"]
    write(workplace, "mine.py", "environment.py", "pem/x", *secrets, "deep/.kaggle/kaggle.json")
    upload = upload_of(workplace)
    assert packed(workplace) == set(upload.files) == {"mine.py", "environment.py", "pem/x"}
    folders = {name.partition("/")[0] if name[1:4] in ("ssh", "aws") else name for name in secrets}
    assert upload.withheld == dict.fromkeys([*folders, "deep/.kaggle"], "may hold secrets")


def test_links_out_of_the_folder_stay_here_and_are_named(
    workplace: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    write(outside, "secret", "deep/secret")
    write(workplace, "mine.py", "data/a.txt")
    links = {
        "file": outside / "secret",
        "folder": outside,
        "up": Path(".."),
        "here": workplace / "data",
        "self": Path(),
    }
    links |= {"data/top": workplace, "one": Path("other"), "other": Path("one"), "dangling": outside / "nothing"}
    for name, target in links.items():
        (workplace / name).symlink_to(target)
    upload = upload_of(workplace)
    assert packed(workplace) == set(upload.files) == {"mine.py", "data/a.txt", "here/a.txt"}
    out = dict.fromkeys(["file", "folder", "up", "dangling"], "a link out of the folder")
    circles = dict.fromkeys(["self", "data/top", "here/top", "one", "other"], "a link in a circle")
    assert upload.withheld == out | circles


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8))
def test_a_link_of_any_name_is_left_out_and_nothing_else(workplace: Path, name: str) -> None:
    if name in (".", "..", "mine.py", ".gitignore", ".rayignore") or len(os.fsencode(name)) > 255:
        return
    write(workplace, "mine.py", "other/x", f"{name}x", f"x{name}")
    link = workplace / name
    if link.exists():
        return
    link.symlink_to("/etc")
    taken = upload_of(workplace)
    try:
        assert packed(workplace) == set(taken.files)
        assert not any(file.startswith(f"{name}/") for file in taken.files)
        assert "mine.py" in taken.files
    finally:
        for path in (link, workplace / f"{name}x", workplace / f"x{name}"):
            path.unlink()
