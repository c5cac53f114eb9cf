import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from raytrain.terminal import printable, printable_line


@given(st.text())
def test_nothing_that_steers_is_left_and_all_else_is(text: str) -> None:
    left = printable(text)
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in left if letter not in "\n\t")
    assert [letter for letter in text if letter.isprintable()] == [letter for letter in left if letter.isprintable()]
    assert printable(left) == left
    assert len(printable_line(text).splitlines()) <= 1
