import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain.errors import RecipeError, TrainingError
from raytrain.launch.jobs import storage as places
from raytrain.launch.jobs.storage import (
    LIST,
    Entry,
    Folder,
    Listing,
    Store,
    check_storage,
    dump,
    list_files,
    measured,
    parse,
    read_list,
)
from raytrain.launch.jobs.transfer import fetch_run
from raytrain.provenance import MARKER
from raytrain.run.checkpoint import CheckpointStore
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.transport import LocalTransport

names = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3).map("/".join)


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a run, and of a copy of it without the mark of a copy."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write(tmp_path / "run", {"metrics.jsonl": b"{}\n", "checkpoints/a": b"x" * 5000, "empty": b""})
    return tmp_path / "run"


class Flaky(Folder):
    """A folder that is read badly a few times.

    Args:
        path: the folder.
        times: how often.
        data: what comes then, before it breaks off.
    """

    def __init__(self, path: Path, times: int, data: bytes = b"", *, breaks: bool = True) -> None:
        super().__init__(path)
        self.times, self.data, self.breaks = times, data, breaks
        self.reads: list[str] = []

    def read(self, name: str) -> Iterator[bytes]:
        self.reads.append(name)
        if self.times == 0:
            yield from super().read(name)
            return
        self.times -= 1
        yield self.data
        if self.breaks:
            raise ConnectionError("the line is dead")


@given(st.dictionaries(names, st.binary(max_size=50), min_size=1, max_size=5))
def test_a_copy_equals_what_was_copied(files: dict[str, bytes]) -> None:
    # A name cannot be a file and a folder at once.
    files = {name: data for name, data in files.items() if not any(other.startswith(f"{name}/") for other in files)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder / "run", files)
        write(folder / "run", {".command.lock": b"1", "checkpoints/.step-1.partial/x": b"half"})
        fetch_run(Folder(folder / "run"), folder / "copy", lambda _: None)
        assert contents(folder / "copy") == files
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@given(st.binary(max_size=3000), st.integers(1, 1000))
def test_size_and_hash_do_not_depend_on_the_pieces(data: bytes, size: int) -> None:
    assert measured(data[at : at + size] for at in range(0, len(data), size)) == measured([data])


def test_a_list_survives_being_written_and_read(run: Path) -> None:
    listing = list_files(run)
    assert parse(dump(listing)) == listing
    assert list(listing) == ["checkpoints/a", "empty", "metrics.jsonl"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_a_list_cannot_name_what_is_outside(name: str) -> None:
    with pytest.raises(TrainingError, match=r"which is outside the run's folder$"):
        parse(dump({name: measured([b"x"])}))


@pytest.mark.parametrize(
    "name",
    ["", ".", "a//b", "a/", "./a", ".bashrc", ".git/config", "a/.ssh/id", ".fetched", "a\x00b", "a\x1b[2J", "x" * 1001],
)
def test_a_list_names_no_hidden_files_and_nothing_odd(name: str) -> None:
    with pytest.raises(TrainingError, match=r", which no file of a run is called, or a hidden one$"):
        parse(dump({name: measured([b"x"])}))


SHA = "0" * 64


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"[]", b'{"a": 1}', b'{"a": {"bytes": 1}}', b"[" * 100_000, b'{"a":' * 100_000, b"\xff"),
        *(
            f'{{"a": {{"bytes": {size}, "sha256": "{SHA}"}}}}'.encode()
            for size in ("null", '"1"', "-1", "1e400", "1.5")
        ),
        *(f'{{"a": {{"bytes": 1, "sha256": {sha}}}}}'.encode() for sha in ("null", '"x"', f'"{SHA}0"', "1")),
        f'{{"a": {{"bytes": 1, "sha256": "{SHA}", "more": 1}}}}'.encode(),
    ],
)
def test_a_damaged_list_is_refused(text: bytes) -> None:
    with pytest.raises(TrainingError, match=r"^files.json is damaged: "):
        parse(text)


def test_a_list_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = iter(lambda: b" " * 1000, None)
    monkeypatch.setattr(places, "MAX_LIST_BYTES", 5000)
    with pytest.raises(TrainingError, match=r"^files.json is damaged: expected at most 5000 bytes; got more$"):
        read_list(endless)
    monkeypatch.setattr(places, "MAX_FILES", 2)
    with pytest.raises(TrainingError, match=r"^files.json names 3 files; expected at most 2, as no run has more$"):
        parse(dump(dict.fromkeys("abc", measured([b""]))))


def test_what_there_is_no_room_for_is_not_begun(run: Path, tmp_path: Path) -> None:
    class Huge(Flaky):
        def listing(self) -> Listing:
            return {"small": measured([b""]), "large": Entry(2**62, SHA)}

    source = Huge(run, 0)
    with pytest.raises(
        RecipeError, match=r": the run's files take 4398046511104.0 MiB more, and .* MiB are free there$"
    ):
        fetch_run(source, tmp_path / "copy", lambda _: None)
    assert source.reads == []


def test_no_link_is_followed_on_either_side(run: Path, tmp_path: Path) -> None:
    write(tmp_path, {"secret": b"of the user", "secrets/deep": b"of the user"})
    (run / "link").symlink_to(tmp_path / "secret")
    (run / "folder").symlink_to(tmp_path / "secrets")
    assert list(list_files(run)) == ["checkpoints/a", "empty", "metrics.jsonl"]
    with pytest.raises(OSError, match="symbolic link"):
        list(Folder(run).read("link"))
    aside = tmp_path / ".copy.partial"
    aside.mkdir(mode=0o755)
    (aside / "metrics.jsonl").symlink_to(tmp_path / "secret")
    (aside / "checkpoints").symlink_to(tmp_path / "secrets")
    fetch_run(Folder(run), tmp_path / "copy", lambda _: None)
    assert contents(tmp_path / "copy").keys() == {"checkpoints/a", "empty", "metrics.jsonl"}
    assert [path for path in (tmp_path / "copy").rglob("*") if path.is_symlink()] == []
    assert (tmp_path / "secret").read_bytes() == (tmp_path / "secrets" / "deep").read_bytes() == b"of the user"
    assert [path.name for path in (tmp_path / "secrets").iterdir()] == ["deep"]


@pytest.mark.parametrize("plant", ["open", "link"])
def test_nothing_is_copied_to_where_others_may_write(run: Path, tmp_path: Path, plant: str) -> None:
    aside = tmp_path / ".copy.partial"
    if plant == "link":
        (tmp_path / "victim").mkdir()
        aside.symlink_to(tmp_path / "victim")
    else:
        aside.mkdir()
        aside.chmod(0o777)
    source = Flaky(run, 0)
    with pytest.raises(
        RecipeError, match=r"copy.partial is not yours alone: others can write to it, or it is a link; "
    ):
        fetch_run(source, tmp_path / "copy", lambda _: None)
    assert source.reads == []


def test_a_copy_is_marked_as_one_and_the_source_is_closed(run: Path, tmp_path: Path) -> None:
    closed: list[bool] = []

    class Closing(Flaky):
        def close(self) -> None:
            closed.append(True)

    fetch_run(Closing(run, 0), tmp_path / "copy", lambda _: None)
    assert (tmp_path / "copy" / MARKER).read_text() == f"{run}\n"
    with pytest.raises(TrainingError):
        fetch_run(Closing(run, 99), tmp_path / "other", lambda _: None)
    assert closed == [True, True]


def test_what_broke_off_is_tried_again_and_what_came_is_kept(run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    source = Flaky(run, 1, b"xx")
    fetch_run(source, tmp_path / "copy", said.append)
    assert contents(tmp_path / "copy") == contents(run)
    assert said[1] == "the line is dead; trying again"
    dead = Flaky(run, 99)
    with pytest.raises(TrainingError, match=r"^the line is dead; what has come is kept in .*: try again$"):
        fetch_run(dead, tmp_path / "other", said.append)
    assert not (tmp_path / "other").exists()
    (tmp_path / ".other.partial" / "left").write_text("of an older list")
    (tmp_path / ".other.partial" / "checkpoints" / "a").write_bytes(b"x" * 5000)
    again = Flaky(run, 0)
    fetch_run(again, tmp_path / "other", said.append)
    assert contents(tmp_path / "other") == contents(run)
    assert again.reads == ["metrics.jsonl"]  # the other was there, and is as it should be


def test_what_is_not_as_listed_is_not_taken(run: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^checkpoints/a: expected 5000 bytes, and 2 came, or others; what has"):
        fetch_run(Flaky(run, 99, b"yy", breaks=False), tmp_path / "copy", lambda _: None)
    with pytest.raises(TrainingError, match=r"^checkpoints/a: expected 5000 bytes, and 5000 came, or others"):
        fetch_run(Flaky(run, 99, b"y" * 5000, breaks=False), tmp_path / "copy", lambda _: None)
    assert not (tmp_path / "copy").exists()


def test_a_file_that_grows_is_taken_as_it_was_listed(run: Path, tmp_path: Path) -> None:
    class Growing(Folder):
        def listing(self) -> Listing:
            listing = super().listing()
            with (run / "metrics.jsonl").open("ab") as file:
                file.write(b"more\n")
            return listing

    fetch_run(Growing(run), tmp_path / "copy", lambda _: None)
    assert (tmp_path / "copy" / "metrics.jsonl").read_bytes() == b"{}\n"


def test_a_damaged_checkpoint_is_named_and_arrives_with_a_complete_one(run: Path, tmp_path: Path) -> None:
    """A run that was killed while it removed an old one can be resumed, and so it can be fetched."""
    write(run, {"checkpoints/step-00000002/rank-00000.safetensors": b"half removed"})
    with pytest.raises(
        TrainingError, match=r"^no checkpoint of the run can be read; its files are kept in .*partial\nch"
    ):
        fetch_run(Folder(run), tmp_path / "copy", lambda _: None)
    assert not (tmp_path / "copy").exists()
    CheckpointStore(run / "checkpoints", 9, ExactAverager(LocalTransport())).save({}, {"step": 4, "best_step": 2})
    said: list[str] = []
    fetch_run(Folder(run), tmp_path / "copy", said.append)
    assert contents(tmp_path / "copy") == contents(run)
    assert said[-1].startswith(
        "a checkpoint of the run is damaged, and others are complete: checkpoints/step-00000002/manifest.json: cannot "
    )
    assert str(tmp_path) not in said[-1]  # where it was for a while


def test_a_list_that_does_not_come_is_asked_for_again(run: Path, tmp_path: Path) -> None:
    class Gone(Flaky):
        def listing(self) -> Listing:
            if self.times:
                self.times -= 1
                raise ConnectionError("the line is dead")
            return super().listing()

    said: list[str] = []
    fetch_run(Gone(run, 2), tmp_path / "copy", said.append)
    assert said[:2] == ["the line is dead; trying again"] * 2
    assert contents(tmp_path / "copy") == contents(run)
    with pytest.raises(TrainingError, match=r"^the line is dead; try again$"):
        fetch_run(Gone(run, 99), tmp_path / "other", said.append)
    (tmp_path / ".other.partial").mkdir()
    with pytest.raises(
        TrainingError, match=r"^the line is dead; what has come is kept in .*/.other.partial: try again$"
    ):
        fetch_run(Gone(run, 99), tmp_path / "other", said.append)


def test_what_is_there_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    write(tmp_path / "copy", {"mine": b""})
    with pytest.raises(RecipeError, match=r"copy is there already, and not empty; name another folder$"):
        fetch_run(Folder(run), tmp_path / "copy", lambda _: None)
    (tmp_path / "fresh").mkdir()
    fetch_run(Folder(run), tmp_path / "fresh", lambda _: None)


def test_what_cannot_be_replaced_is_refused_before_anything_comes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mount")
    source = Flaky(run, 0)
    for target in (
        Path(),
        tmp_path / "empty",
        Path("new/.."),
        *(tmp_path / name for name in ("link", "dangling", "mount")),
    ):
        with pytest.raises(
            RecipeError, match=r" is a link, a mount point or the current folder; name another, or a new"
        ):
            fetch_run(source, target, lambda _: None)
    assert source.reads == []
    fetch_run(source, Path("new"), lambda _: None)
    assert contents(tmp_path / "empty" / "new") == contents(run)


def test_a_store_holds_what_was_put_there_once_its_list_is_there(run: Path, tmp_path: Path) -> None:
    store = Store(f"memory:/{tmp_path}/run")
    store.announce("train digits")
    assert not store.complete()
    with pytest.raises(RecipeError, match=r"there is no files.json, which is stored last: the job still runs"):
        fetch_run(store, tmp_path / "copy", lambda _: None)
    assert store.put(run) == 5003
    assert store.complete()
    fetch_run(store, tmp_path / "copy", lambda _: None)
    assert contents(tmp_path / "copy") == contents(run)
    assert fsspec.filesystem("memory").exists(f"{tmp_path}/run/{LIST}")


@pytest.mark.parametrize(
    ("storage", "where"),
    [
        ("/shared/runs", "/shared/runs"),
        ("/shared/runs/", "/shared/runs"),
        ("file:///shared/runs/", "/shared/runs"),
        ("s3://bucket/runs/", "s3://bucket/runs"),
        ("local:///runs", "local:///runs"),
        ("sftp://me@host:22/a:b@c", "sftp://me@host:22/a:b@c"),
    ],
)
def test_a_place_is_a_folder_or_a_url(storage: str, where: str) -> None:
    assert check_storage(storage) == where


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("runs", "--storage: expected an absolute path that the cluster's machines share, or a URL as s3://"),
        ("~/runs", "--storage: expected an absolute path"),
        ("s4://bucket", "--storage: no such protocol 's4'; known: "),
        ("memory://runs", "--storage: memory:// ends with the job; name a shared folder"),
        (
            "https://host/runs?sig=SECRET",
            "--storage: what is behind '?' in https://host/runs, a signature too, would be seen in the list of jobs",
        ),
        ("s3://bucket/runs#SECRET", "--storage: what is behind '#' in s3://bucket/runs, a signature too, would be "),
        ("ssh://-oProxyCommand=x/runs", "--storage: expected a place without '..', on a host whose name is one; got "),
        ("ssh://me@-x/runs", "--storage: expected a place without '..', on a host whose name is one; got 'ssh://me@-x"),
        ("/shared/../etc", "--storage: expected a place without '..', on a host whose name is one; got '/shared/../et"),
    ],
)
def test_other_places_are_refused(storage: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_storage(storage)
    assert str(caught.value).startswith(message)
    assert "SECRET" not in str(caught.value)


def test_a_password_is_not_taken_and_not_shown() -> None:
    with pytest.raises(RecipeError) as caught:
        check_storage("sftp://me:secret@host:22/runs")
    assert str(caught.value).startswith("--storage: the password for sftp://host:22 would be seen in the list of jobs")
    assert "FSSPEC_SFTP_PASSWORD" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_store_without_its_package_is_said() -> None:
    with pytest.raises(RecipeError, match=r"^s3://bucket/run cannot be used: ImportError: Install s3fs"):
        Store("s3://bucket/run")
