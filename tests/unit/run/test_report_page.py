import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain.run.report.page import number, render
from raytrain.run.report.panel import MAX_POINTS, MAX_ROWS, Panel, compared, line_chart, table

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"'"


def charts(page):
    return json.loads(re.search(r'id="panels">(.*?)</script>', page, re.DOTALL)[1])


def test_markup_of_any_string_is_shown_and_never_run():
    panels = [
        line_chart(HOSTILE, {HOSTILE: ([1], [2.0])}, x=HOSTILE, y=HOSTILE, note=HOSTILE),
        table(HOSTILE + "2", [HOSTILE], [[HOSTILE]], note=HOSTILE),
    ]
    page = render(HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, panels, HOSTILE)
    assert page.count("<script") == 3
    assert "<img" not in page
    assert "<" not in charts(page)[0]["traces"][0]["name"]


def test_a_page_names_no_other_address():
    page = render("run", "", {}, [table("t", ["a"], [["b"]])])
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", page)


@given(st.integers(1, 3 * MAX_POINTS), st.floats(-1e6, 1e6))
def test_long_lines_are_averaged_over_bins(count, value):
    (trace,) = line_chart("t", {"a": (range(count), [value] * count)}, x="step", y="y").traces
    assert len(trace["x"]) == len(trace["y"]) <= MAX_POINTS
    assert trace["x"][-1] == count - 1
    assert trace["y"] == pytest.approx([value] * len(trace["y"]))


def test_what_is_not_finite_is_a_gap_and_a_logarithmic_axis_has_room_for_positive_values_alone():
    (trace,) = line_chart("t", {"a": ([1, 2, 3], [math.nan, 1.0, -1.0])}, x="x", y="y", log_y=True).traces
    assert trace["x"] == [1, 2]
    assert trace["y"] == [None, 1.0]
    assert line_chart("t", {"a": ([1, 2], [math.inf, None])}, x="x", y="y") is None
    assert table("t", ["a"], []) is None


def test_of_a_long_table_the_last_rows_are_shown():
    panel = table("t", ["a"], [[place] for place in range(MAX_ROWS + 3)], note="Sorted.")
    assert panel.rows[0] == [3]
    assert panel.note == f"Sorted. The last {MAX_ROWS} of {MAX_ROWS + 3} rows."


def test_compared_runs_share_the_panels_of_one_title():
    one = [line_chart("Loss", {"train": ([1], [2.0])}, x="step", y="loss"), table("Events", ["what"], [["began"]])]
    two = [line_chart("Loss", {"train": ([1], [3.0])}, x="step", y="loss"), table("Events", ["who"], [["worker 0"]])]
    loss, events = compared({"a": one, "b": [*two, table("Own", ["x"], [[1]])]})[:2]
    assert [trace["name"] for trace in loss.traces] == ["a · train", "b · train"]
    assert events.columns == ["run", "what", "who"]
    assert events.rows == [["a", "began", ""], ["b", "", "worker 0"]]


def test_the_colours_of_compared_runs_differ():
    bars = Panel("Bars", [{"name": "share", "marker": {"color": "c6"}, "error_x": {"color": "c7", "kind": "cosine"}}])
    (joined,) = compared({"a": [bars], "b": [bars]})
    assert [trace["marker"]["color"] for trace in joined.traces] == ["c6", "c0"]
    assert [trace["error_x"] for trace in joined.traces] == [{"color": "c7", "kind": "cosine"}] * 2


@pytest.mark.parametrize(
    ("value", "shown"), [(0.123456, "0.1235"), (123456.7, "123,457"), (3, "3"), (None, ""), (True, "True")]
)
def test_figures_have_four_digits(value, shown):
    assert number(value) == shown
