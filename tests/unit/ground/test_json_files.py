"""JSON is checked before it is believed, and whatever it holds, only errors of ours come out."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain import json_files
from raytrain.errors import CheckpointError, TrainingError
from raytrain.json_files import add_checksum, parse_json, parse_rows, read_rows, to_json, verify_checksum

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text
documents = st.dictionaries(
    text,
    st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3)),
    min_size=1,
    max_size=4,
)


@given(documents)
def test_what_has_a_checksum_comes_back_to_the_bit(content: dict[str, Any]) -> None:
    data = add_checksum(content)
    assert data == add_checksum(dict(reversed(content.items())))
    assert json.loads(data)["sha256"]
    found = parse_json(verify_checksum(data, "x", CheckpointError), dict[str, Any], "x")
    assert json.dumps(found, sort_keys=True) == json.dumps(content, sort_keys=True)


@given(documents, st.data())
def test_every_change_of_it_is_refused(content: dict[str, Any], data: st.DataObject) -> None:
    good = add_checksum(content)
    first = data.draw(st.integers(0, len(good)))
    last = data.draw(st.integers(first, len(good)))
    changed = good[:first] + data.draw(st.binary(max_size=9)) + good[last:]
    if changed != good:
        with pytest.raises(CheckpointError, match=r"^x: its contents changed since it was written$"):
            verify_checksum(changed, "x", CheckpointError)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Invalid JSON: EOF while parsing a value at line 1 column 0"),
        (b"[" * 100_000, "Invalid JSON: recursion limit exceeded at line 1 column 202"),
        (b'{"a":' * 100_000, r"Invalid JSON: recursion limit exceeded at line 1 column \d+"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Invalid JSON: number out of range at line 1 column 4308"),
        (b'{"a": 1e400}', "a: Input should be a valid integer"),
        (b'{"a": 1.0}', "a: Input should be a valid integer"),
        (b'{"a": "1"}', "a: Input should be a valid integer"),
        (b'{"a": true}', "a: Input should be a valid integer"),
        (b'{"\\u001b[2J": "x"}', r"'\\x1b\[2J': Input should be a valid integer"),
        (b"[1]", "Input should be an object"),
        (b'{"a": "\xff"}', "Invalid JSON: invalid unicode code point at line 1 column 8"),
        (b'{"a": 1}'.ljust(999_999), "expected at most 700000 bytes; got 999999"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(TrainingError, match=rf"^list: cannot be read: {message}$"):
        parse_json(data, dict[str, int], "list", max_bytes=700_000)


@given(st.binary() | documents.map(lambda content: json.dumps(content).encode()))
def test_whatever_it_is_only_errors_of_ours_come_out(data: bytes) -> None:
    try:
        found = parse_json(data, dict[str, int], "x")
    except TrainingError:
        return
    assert all(isinstance(key, str) and type(value) is int for key, value in found.items())


def test_rows_are_read_up_to_the_last_line_feed_and_those_that_are_none_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "MAX_ROW_BYTES", 32)
    good = [{"a": 1}, {"b": "x" * 20}, {"c": None}]
    lines = [json.dumps(row).encode() for row in good]
    lines[1:1] = [b'{"torn": ', b"", b"\0\0", b"[1]", b"\xff", b'{"a": 1' + b" " * 57 + b"}", b'{"d": ' + b"[" * 9999]
    (tmp_path / "rows").write_bytes(b"\n".join([*lines, b'{"being": "written"']))
    assert read_rows(tmp_path / "rows", dict[str, Any]) == (good, 7)
    assert parse_rows(lines[:1], dict[str, int]) == ([{"a": 1}], 0)


@given(st.dictionaries(st.text(), st.floats() | st.text() | st.lists(st.floats(), max_size=2), max_size=3))
def test_what_json_lacks_is_replaced(row: dict[str, Any]) -> None:
    ((found,), damaged) = parse_rows([to_json(row).encode()], dict[str, Any])
    assert damaged == 0
    for key, value in row.items():
        same = found[key.encode(errors="replace").decode()]
        if isinstance(value, float):
            assert same == (value if math.isfinite(value) else None)
        if isinstance(value, str):
            assert same == value.encode(errors="replace").decode()
