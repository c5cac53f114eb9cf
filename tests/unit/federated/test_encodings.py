"""Numbers as bytes: what arrives is what the encoding promises, and arrives unchanged a second time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federated.encodings import COEFFICIENT_ENCODINGS, ENCODINGS, PayloadError

RELATIVE = {"float32": 2.0**-24, "float16": 2.0**-11, "one-byte": 2 ** (1 / 12) - 1}
RANGE = {"float32": (2.0**-126, 3.4e38), "float16": (2.0**-14, 65000.0), "one-byte": (2.0**-10.5, 2.0**10.5)}


@given(st.sampled_from(list(ENCODINGS)), st.lists(st.floats(width=32), max_size=30))
def test_numbers_arrive_to_the_precision_of_their_encoding(name: str, values: list[float]) -> None:
    encoding, sent = ENCODINGS[name], np.array(values, np.float64)
    data = encoding.write(sent)
    assert len(data) == encoding.size(len(values))
    found = encoding.read(data, len(values))
    assert found.dtype == np.float32
    assert encoding.write(found) == data, "what has arrived arrives again"
    for value, number in zip(values, found.tolist(), strict=True):
        assert encoding.rounded(value) == number or np.isnan(number)
        if name == "sign":
            assert number == (1 if value > 0 else -1)
        elif not np.isfinite(value):
            assert np.isnan(number)
        elif RANGE[name][0] <= abs(value) <= RANGE[name][1]:
            assert abs(number - value) <= RELATIVE[name] * abs(value) * (1 + 1e-6)


@pytest.mark.parametrize(("name", "value"), [("float16", 70000.0), ("float32", 1e39), ("float16", -np.inf)])
def test_a_number_beyond_its_encoding_is_not_used(name: str, value: float) -> None:
    assert np.isnan(ENCODINGS[name].rounded(value))


MAGNITUDES = (
    st.floats(-1e3, 1e3)
    | st.floats(-1e-30, 1e-30)
    | st.floats(-1e-300, 1e-300)
    | st.sampled_from([0.0, 2.0**-20, -(2.0**-20 - 2.0**-40)])
)


@given(st.sampled_from(list(COEFFICIENT_ENCODINGS)), st.lists(MAGNITUDES, max_size=30))
def test_coefficients_arrive_once_rounded_and_then_unchanged(name: str, values: list[float]) -> None:
    encoding, sent = COEFFICIENT_ENCODINGS[name], np.array(values, np.float64)
    assert len(encoding.write(sent)) == encoding.size(len(values))
    once = encoding.rounded(sent)
    assert np.array_equal(encoding.rounded(once), once)
    largest = np.abs(sent).max(initial=0)
    least = 2.0**-149 if name == "float32" else max(largest * 2.0**-38, 2.0**-1024)  # the lowest power is -1000
    assert (np.abs(once - sent) <= RELATIVE[name] * np.abs(sent) + least).all()


@given(st.lists(MAGNITUDES, min_size=1, max_size=30), st.data())
def test_some_coefficients_alone_are_what_they_are_among_all(values: list[float], data: st.DataObject) -> None:
    """So a client that is sent those that changed has what one has that is sent all."""
    for encoding in COEFFICIENT_ENCODINGS.values():
        once = encoding.rounded(np.array(values))
        some = np.array(data.draw(st.lists(st.sampled_from(range(len(values))), unique=True)), np.int64)
        assert np.array_equal(encoding.rounded(once[some]), once[some])


def test_half_precision_has_room_for_the_smallest_learning_rates() -> None:
    coefficients = np.array([3e-7, -1.2345e-9, 0.0])
    found = COEFFICIENT_ENCODINGS["float16"].rounded(coefficients)
    np.testing.assert_allclose(found, coefficients, rtol=2.0**-11)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("float32", np.array([np.nan], "<f4").tobytes(), "expected finite coefficients; some are not"),
        ("float16", b"\0\0" + np.array([np.inf], "<f2").tobytes(), "expected finite coefficients; some are not"),
        ("float16", b"\xff\x7f\0\0", "expected a power of two from -1000 to 1000; got 32767"),
    ],
)
def test_bytes_that_are_no_coefficients_are_refused(name: str, data: bytes, message: str) -> None:
    with pytest.raises(PayloadError, match=f"^{message}$"):
        COEFFICIENT_ENCODINGS[name].read(data, 1)


def test_one_byte_saturates_at_both_ends() -> None:
    rounded = ENCODINGS["one-byte"].rounded
    smallest, largest = 2.0**-10.5, 2.0**10.5
    for value, arrives in ((0.0, 0.0), (1e-9, smallest), (-1e-9, -smallest), (1e9, largest), (-1e9, -largest)):
        assert rounded(value) == pytest.approx(arrives)


def test_one_bit_has_no_room_for_0() -> None:
    assert [ENCODINGS["sign"].can_write(value) for value in (1.0, -0.5, 0.0, np.nan)] == [True, True, False, False]
    assert [ENCODINGS["one-byte"].can_write(value) for value in (1.0, 0.0, np.nan)] == [True, True, False]
