import csv
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data.cache import StoredExamples
from raytrain.data.columns import column_of, domain_of, label_of, text_of
from raytrain.data.records import LocalRecords, Record, is_local, read_records
from raytrain.errors import RecipeError
from raytrain.tasks.splits import RecordOptions, Splits

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(str.strip)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        path.write_text("".join("\t".join(map(str, row.values())) + "\n" for row in rows), encoding="utf-8")


def splits(path: Path | str, **options: Any) -> Splits:
    return Splits(RecordOptions(name="any", path=str(path), **options))


def read(path: Path | str, part: str = "train", **options: Any) -> list[dict[str, Any]]:
    return [dict(record.fields) for record in splits(path, **options).records(part)]


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.fixed_dictionaries({"text": texts, "label": texts}), min_size=2, max_size=4))
@pytest.mark.parametrize("ending", [".csv", ".json", ".jsonl", ".parquet"])
def test_what_was_written_is_read(rows: list[dict[str, str]], ending: str, tmp_path_factory: Any) -> None:
    file = tmp_path_factory.mktemp("rows") / f"x{ending}"
    write(file, rows)
    assert [dict(record.fields) for record in read_records(file)] == rows


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_types_are_kept_and_not_guessed(tmp_path: Path, ending: str) -> None:
    rows = [{"text": "2020-01-01", "label": 1, "messages": [{"role": "user", "content": "null"}]}] * 2
    write(tmp_path / f"x{ending}", rows)
    assert [dict(record.fields) for record in read_records(tmp_path / f"x{ending}")] == rows


def test_a_table_of_tabs_may_have_a_header_and_has_no_quotes(tmp_path: Path) -> None:
    body = '"a film\t1\n \x85so-so\t0\n\nNaN\t1'
    (tmp_path / "bare.tsv").write_text(body)
    (tmp_path / "usual.tsv").write_text(f"Sentence\tlabel\r\n{body}".replace("\n", "\r\n"), newline="")
    (tmp_path / "named.tsv").write_text(f"satz\twert\n{body}")
    expected = [('"a film', "1"), (" \x85so-so", "0"), ("NaN", "1")]
    found = {
        name: list(LocalRecords(str(tmp_path / f"{name}.tsv"), ("satz",)).records("train"))
        for name in ("bare", "usual", "named")
    }
    for name, columns in (("bare", "12"), ("usual", ("Sentence", "label")), ("named", ("satz", "wert"))):
        assert [record.fields for record in found[name]] == [dict(zip(columns, row, strict=True)) for row in expected]
    assert [record.where for record in found["bare"]] == ["bare.tsv, line 1", "bare.tsv, line 2", "bare.tsv, line 4"]
    assert [record.where for record in found["usual"]] == [f"usual.tsv, line {line}" for line in (2, 3, 5)]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("line", [("a", 1), ("  b", 2), ("c", 5)]),
        ("paragraph", [("a\n  b", 1), ("c", 5)]),
        ("file", [("a\n  b\n\n \nc\n", 1)]),
    ],
)
def test_texts_are_cut_as_wanted(tmp_path: Path, unit: Any, expected: list[tuple[str, int]]) -> None:
    (tmp_path / "x.txt").write_text("a\n  b\n\n \nc\n")
    found = [
        (record.fields["text"], record.where)
        for record in LocalRecords(str(tmp_path / "x.txt"), (), unit).records("train")
    ]
    assert found == [(text, f"x.txt, line {line}") for text, line in expected]


@pytest.mark.parametrize(
    ("files", "train", "valid"),
    [
        (["train.tsv", "dev.tsv", "test.tsv", "README.md"], ["train.tsv"], ["dev.tsv"]),
        (["train.jsonl", "validation.jsonl"], ["train.jsonl"], ["validation.jsonl"]),
        (["train-00000-of-00002.txt", "train-00001-of-00002.txt", "valid.txt"], None, ["valid.txt"]),
        (
            ["train/a.txt", "train/b.txt", "val/c.txt", ".hidden/train.txt"],
            ["train/a.txt", "train/b.txt"],
            ["val/c.txt"],
        ),
        (["Training.csv", "DEV.csv", "notes.csv"], ["Training.csv"], ["DEV.csv"]),
    ],
)
def test_files_are_splits_by_their_names(
    tmp_path: Path, files: list[str], train: list[str] | None, valid: list[str]
) -> None:
    for name in files:
        write(tmp_path / name, [{"text": name, "label": "x"}, {"text": name, "label": "y"}])
    found = splits(tmp_path)
    train = train or files[:2]
    assert {record.where.split(",")[0] for record in found.records("train")} == set(train)
    assert {record.where.split(",")[0] for record in found.records("valid")} == set(valid)


def test_a_long_document_is_a_field_of_a_table(tmp_path: Path) -> None:
    rows = [{"text": "long " * 100_000, "label": "a"}, {"text": "short", "label": "b"}]
    write(tmp_path / "x.csv", rows)
    csv.field_size_limit(131_072)
    assert [dict(record.fields) for record in read_records(tmp_path / "x.csv")] == rows


def test_a_glob_is_split_by_names_too(tmp_path: Path) -> None:
    for name in ("a/train.txt", "b/train.txt", "b/dev.txt", "b/skip.csv"):
        write(tmp_path / name, [{"text": name}, {"text": f"{name} again"}])
    found = splits(f"{tmp_path}/**/*.txt")
    assert [record.where for record in found.records("train")] == [
        f"{name}/train.txt, line {line}" for name in "ab" for line in (1, 2)
    ]
    assert [record.where for record in found.records("valid")] == ["b/dev.txt, line 1", "b/dev.txt, line 2"]


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 60), st.floats(0.01, 0.99))
def test_what_is_held_out_is_the_share_and_is_never_learned(tmp_path_factory: Any, count: int, share: float) -> None:
    file = tmp_path_factory.mktemp("held") / "x.txt"
    file.write_text("\n".join(map(str, range(count))))
    train, valid = ([row["text"] for row in read(file, part, valid=share)] for part in ("train", "valid"))
    assert not set(train) & set(valid)
    assert sorted(map(int, train + valid)) == list(range(count))
    assert len(valid) == min(count - 1, max(1, round(count * share)))
    assert train == sorted(train, key=int), "in the order of the file"
    assert valid == [row["text"] for row in read(file, "valid", valid=share)]


def test_something_else_can_be_held_out(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        write(tmp_path / f"{name}.tsv", [{"text": f"of {name}", "label": 0}])
    write(tmp_path / "other" / "more.tsv", [{"text": "of more", "label": 0}])
    assert read(tmp_path, "valid")[0]["1"] == "of dev"
    assert read(tmp_path, "valid", held_out="test")[0]["1"] == "of test"
    assert read(tmp_path, "valid", held_out=str(tmp_path / "other/more.tsv"))[0]["1"] == "of more"
    # Without a validation split, nothing is taken from the training records then.
    (tmp_path / "dev.tsv").unlink()
    write(tmp_path / "train.tsv", [{"text": f"{place}", "label": 0} for place in range(10)])
    assert len(read(tmp_path)) == 9
    assert len(read(tmp_path, held_out="test")) == 10


@settings(deadline=None, max_examples=20)
@given(names=st.sets(st.sampled_from(["train", "dev", "test"]), min_size=1))
def test_data_that_nothing_is_learned_from_is_measured_as_a_whole(tmp_path_factory: Any, names: set[str]) -> None:
    folder = tmp_path_factory.mktemp("other")
    for name in names:
        write(folder / f"{name}.tsv", [{"text": f"{place} of {name}", "label": 0} for place in range(20)])
    measured = next(name for name in ("dev", "test", "train") if name in names)
    expected = [f"{place} of {measured}" for place in range(20)]
    learned = RecordOptions(name="x", path=str(folder / "elsewhere.tsv"), held_out="/gone.tsv")
    given_ = RecordOptions(name="x", path=str(folder), held_out="/gone.tsv")
    options = given_.model_copy(update=given_.for_evaluation(learned))
    assert [record.fields["1"] for record in Splits(options).records("valid")] == expected
    alone = read(folder / f"{measured}.tsv", "valid", valid=1)
    assert [row["1"] for row in alone] == expected
    assert given_.for_evaluation(given_) == {}, "of the run's own data, what was learned from is not measured on"


def test_what_nothing_is_learned_from_cannot_be_learned(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(RecipeError, match=r"^task.valid: 1 holds out all of .*, and leaves nothing to learn from$"):
        read(tmp_path, valid=1)


def test_paths_become_absolute_and_hub_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    expected = {
        "x.tsv": f"{tmp_path}/x.tsv", "./x": f"{tmp_path}/x", "here": f"{tmp_path}/here", "a/*": f"{tmp_path}/a/*",
        "org/name": "org/name", "imdb": "imdb", "org/name:config": "org/name:config", "": "",
    }  # fmt: skip
    for given_, absolute in expected.items():
        options = RecordOptions(name="x", path=given_)
        assert options.path == absolute
        assert RecordOptions(name="x", path=options.path).path == absolute
        assert is_local(options.path) == absolute.startswith("/") or not given_
    (tmp_path / "test").mkdir()
    assert RecordOptions(name="x", held_out="test").held_out == "test", "a split goes before a folder"


def files(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


BAD_ROWS = [
    ("x.jsonl", b'{"a": 1}\n\n{"a": }\n', "x.jsonl, line 3: not JSON: Expecting value (column 7)"),
    ("x.jsonl", b'{"a": 1}\n[1]\n', "x.jsonl, line 2: expected a JSON object; got list"),
    ("x.json", b'[{"a": 1},\n 3 4]', "x.json, line 2: not JSON: Expecting ',' delimiter (column 4)"),
    ("x.json", b'[{"a": 1}, 3]', "x.json, row 2: expected a JSON object; got int"),
    ("x.tsv", b"one\t1\ntwo\n", "x.tsv, line 2: expected 2 columns; got 1"),
    ("x.csv", b"a,b\n1,2\n\n1,2,3\n", "x.csv, line 4: expected 2 columns; got 3"),
    ("x.csv", b'a,b\n1,"2\n', "x.csv, line 2: not CSV: unexpected end of data"),
    ("x.txt", b"fine\nna\xefve\n", "x.txt, line 2: not UTF-8 (byte 3 of the line)"),
    ("x.parquet", b"PAR1 not at all", "x.parquet, row 1: not Parquet: "),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_ROWS)
def test_a_bad_row_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    files(tmp_path, {name: content})
    with pytest.raises(RecipeError, match=f"^task.path: {re.escape(message)}"):
        read(tmp_path / name, held_out=str(tmp_path / name))


ONE = {"train.txt": b"a"}
TWO = {**ONE, "test.txt": b"a"}
MISSING: list[tuple[dict[str, bytes], dict[str, str], str]] = [
    ({}, {"path": ""}, "path: required, and not given; expected a file, a folder with train.tsv and dev.tsv "),
    ({}, {"path": "{}/none.tsv"}, "path: no such file or folder: {}/none.tsv"),
    ({"x.doc": b""}, {}, "path: there is no file to read (.jsonl, .json, .csv, .tsv, .txt, .parquet) at {}"),
    ({"x.txt": b" \n"}, {"path": "{}/x.txt"}, "path: the train part of {}/x.txt has no records"),
    (ONE, {}, "path: {} has 1 record(s), too few to hold some out; give it a validation split, or set task.held_out"),
    ({"train.txt": b"", "dev.txt": b"a"}, {}, "path: the train part of {} has no records"),
    ({"train.txt": b"a", "dev.txt": b""}, {}, "path: the valid part of {} has no records"),
    ({"test.txt": b"a"}, {}, "path: {} has no training records, only test; to measure a trained model on them, use"),
    (TWO, {"held_out": "dev"}, "held_out: 'dev' is neither a file nor a split of {}; known: test, train"),
    (ONE, {"held_out": "{}/gone.txt"}, "held_out: '{}/gone.txt' is neither a file nor a split of {}; known: train"),
    (TWO, {"held_out": "{}"}, "held_out: {} has the splits test, train; name one file of it"),
    ({"x/bad.jsonl": b"{", "train.txt": b"a"}, {"held_out": "{}/x/bad.jsonl"}, "held_out: bad.jsonl, line 1: not JSON"),
]


@pytest.mark.parametrize(("contents", "options", "message"), MISSING)
def test_missing_and_empty_data_is_refused(
    tmp_path: Path, contents: dict[str, bytes], options: dict[str, str], message: str
) -> None:
    folder = str(files(tmp_path, contents))
    options = {key: value.format(folder) for key, value in {"path": "{}", **options}.items()}

    def both() -> None:
        for part in ("train", "valid"):
            list(Splits(RecordOptions(name="x", **options)).records(part))

    with pytest.raises(RecipeError, match=f"^task.{re.escape(message.replace('{}', folder))}"):
        both()


def test_a_data_set_of_the_hub_without_a_network_says_what_to_do() -> None:
    with pytest.raises(RecipeError) as refused:
        read("org/name:config")
    assert str(refused.value) == (
        "task.path: 'org/name:config' is neither a file or folder here nor a data set that could be had from the "
        "Hugging Face hub (Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)); to use a local copy, run `hf "
        "download --repo-type dataset org/name --local-dir DIR` where there is a network, and set task.path=DIR"
    )


def record(**fields: Any) -> Record:
    return Record(fields, "x.csv, line 7", "x")


def test_columns_are_found_by_their_use() -> None:
    assert column_of(record(id=1, Sentence="a", label="b"), "text") == "Sentence"
    assert column_of(record(id=1, note="a", label="b"), "text", "note") == "note"
    assert column_of(record(only="a"), "text") == column_of(record(only="a"), "text", "other") == "only"
    bare = Record({"1": "a", "2": "b", "3": "c"}, "", "")
    assert (column_of(bare, "text"), column_of(bare, "label"), column_of(bare, "label", "2")) == ("1", "3", "2")
    assert (domain_of(record(a=1), ""), domain_of(record(a=1), "a")) == ("x", "1")
    assert [label_of(record(label=value)) for value in (3, "3", " -3", 3.0, True, "good ", "1.5")] == [
        3, 3, -3, 3, 1, "good", "1.5",
    ]  # fmt: skip


LABEL = "expected a label in column 'label', an integer or a few words; got"
NAME = "; name the column of the labels with task.label"


@pytest.mark.parametrize(
    ("read", "fields", "given", "message"),
    [
        (text_of, {"a": "x", "b": "y"}, "", "no column is called text or sentence or content or document or review or "
         "comment or title; name one of: a, b"),
        (text_of, {"a": "x", "text": "y"}, "txt", "there is no column 'txt'; did you mean text? known: a, text"),
        (text_of, {"text": None}, "", "expected text in column 'text'; got None"),
        (text_of, {"text": "a\ud800"}, "", "the text in column 'text' has half a character (a lone surrogate) at 1"),
        (label_of, {"label": "so long " * 20}, "", f"{LABEL} '{'so long ' * 9}so l...{NAME}"),
        (label_of, {"label": "a\ud800"}, "", "the text in column 'label' has half a character (a lone surrogate) at 1"),
        (label_of, {"label": None}, "", f"{LABEL} None{NAME}"),
        (label_of, {"label": 0.5}, "", f"{LABEL} 0.5{NAME}"),
        (label_of, {"a": "x", "stars": 3}, "star", "there is no column 'star'; did you mean stars? known: a, stars"),
        (domain_of, {"a": 1}, "b", "there is no column 'b'; known: a"),
    ],
)  # fmt: skip
def test_columns_that_are_not_there_are_named(
    read: Callable[..., Any], fields: dict[str, Any], given: str, message: str
) -> None:
    role = {text_of: "text", label_of: "label", domain_of: "domain"}[read]
    arguments = ("text", given) if read is text_of else (given,)
    with pytest.raises(RecipeError) as refused:
        read(record(**fields), *arguments)
    assert str(refused.value) == f"task.{role}: x.csv, line 7: {message}"


class Maker:
    """Makes examples, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Iterator[dict[str, Any]]:
        self.calls += 1
        yield from ({"tokens": [1, 2], "domain": "b"}, {"tokens": [], "domain": "a"}, {"tokens": [3], "domain": "b"})


COLUMNS = {"tokens": "tokens", "domain": "string"}


def test_examples_are_made_once_whoever_asks(tmp_path: Path) -> None:
    make = Maker()
    found: list[StoredExamples] = []
    threads = [
        threading.Thread(target=lambda: found.append(StoredExamples(make, COLUMNS, str(tmp_path)))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert make.calls == 1
    for examples in found:
        assert [examples[place]["tokens"] for place in range(len(examples))] == [[1, 2], [], [3]]
        assert [examples.domain(place) for place in range(3)] == ["b", "a", "b"]
        assert [examples.label(place) for place in range(3)] == [1, 0, 1]
    StoredExamples(make, COLUMNS, f"{tmp_path} with another key")
    assert make.calls == 2


def test_an_error_while_examples_are_made_leaves_nothing(tmp_path: Path) -> None:
    def bad() -> Iterator[dict[str, Any]]:
        yield {"tokens": [1], "domain": "a"}
        raise RecipeError("task.path: no good")

    with pytest.raises(RecipeError, match="^task.path: no good$"):
        StoredExamples(bad, COLUMNS, str(tmp_path))
    assert len(StoredExamples(Maker(), COLUMNS, str(tmp_path))) == 3


def test_a_file_that_changed_has_another_stamp(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", [{"text": "a"}, {"text": "b"}])
    before = splits(tmp_path)
    stamps = {
        before.fingerprint("train"),
        before.fingerprint("valid"),
        splits(tmp_path, valid=0.6).fingerprint("train"),
    }
    write(tmp_path / "train.txt", [{"text": "a"}, {"text": "c"}, {"text": "d"}])
    stamps |= {splits(tmp_path).fingerprint("train")}
    assert len(stamps) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["train.txt"], "nothing is written beside the user's files"
