"""The report page of a federated run: what its rows become."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.report import panels
from raytrain.run.directory import RunDirectory
from raytrain.run.report.page import render

METRICS = """
{"step": 0, "valid": {"loss": 2.0, "accuracy": 0.1}}
{"step": 1, "seconds": 2.0, "bytes_down": 100, "bytes_up": 20, "heard": 2, "missing": 1, "refused": 0, "late": 0}
{"step": 2, "seconds": 5.0, "bytes_down": 300, "bytes_up": 50, "heard": 1, "missing": 1, "refused": 1, "late": 1}
{"step": 2, "valid": {"loss": 1.0, "accuracy": 0.7, "clients": 0.6, "worst_tenth": 0.2, "spread": 0.1}}
"""
ROUNDS = """
{"round": 0, "heard": [1, 4], "missing": {"7": "no answer"}, "refusals": [], "late": []}
{"round": 1, "heard": [2], "missing": {"3": "no answer"}, "refusals": ["client 5: wrong"], "late": ["client 7: late"]}
"""


def test_a_run_s_rows_become_charts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(METRICS.lstrip())
    (tmp_path / "rounds.jsonl").write_text(ROUNDS.lstrip())
    (tmp_path / "partition.json").write_text('{"clients": 3, "labels": {"0": [1, 0, 2], "7": [0, 4, 0]}}')
    found = {panel.title: panel for panel in panels(RunDirectory(tmp_path))}
    lines = {
        (title, trace["name"]): (list(trace["x"]), list(trace["y"]))
        for title, panel in found.items()
        for trace in panel.traces
    }
    assert lines["Held-out accuracy over rounds", "accuracy"] == ([0, 2], [0.1, 0.7])
    assert lines["Held-out accuracy over bytes", "accuracy"] == ([0, 350 / 1e6], [0.1, 0.7])
    assert lines["On clients' own examples", "worst_tenth"] == ([2], [0.2])
    assert lines["Clients of a round", "heard"] == ([1, 2], [2, 1])
    assert lines["Clients of a round", "refused"] == ([1, 2], [0, 1])
    assert lines["Bytes of a round", "bytes_down"] == ([1, 2], [100, 200])
    assert lines["Time of a round", "seconds"] == ([1, 2], [2.0, 3.0])
    assert lines["Labels of clients", "0"] == ([0, 1, 2], [1, 0, 2])
    assert lines["Labels of clients", "7"] == ([0, 1, 2], [0, 4, 0])
    assert found["Labels of clients"].layout["barmode"] == "stack"
    assert found["Clients that were not heard"].rows == [
        [1, "client 7: no answer"],
        [2, "client 3: no answer"],
        [2, "client 5: wrong"],
        [2, "client 7: late"],
    ]


def test_a_run_that_has_not_begun_has_no_panels(tmp_path: Path) -> None:
    assert panels(RunDirectory(tmp_path)) == []


@settings(max_examples=100)
@given(data=st.data())
def test_whatever_is_in_the_files_is_reported_or_left_out(
    data: st.DataObject, changed_rows: Callable[[str], st.SearchStrategy[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """They may be of a fetched run."""
    folder = tmp_path_factory.mktemp("damaged")
    for name, text in (("metrics.jsonl", METRICS), ("rounds.jsonl", ROUNDS)):
        (folder / name).write_text(data.draw(changed_rows(text)))
    render("federate", "", {}, panels(RunDirectory(folder)))
