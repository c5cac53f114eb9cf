"""The report page of a training run: what its rows become."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.run.directory import RunDirectory
from raytrain.run.report.page import render
from raytrain.training.report import training_panels

METRICS = """
{"step": 1, "samples": 8, "seconds": 0.5, "loss": 2.5, "lr": 0.01, "gradient_norm": 1.5, "bytes_sent": 0, "every": 1}
{"step": 2, "samples": 16, "seconds": 1.5, "loss": 2.0, "lr": 0.02, "gradient_norm": null, "bytes_sent": 8, "every": 2}
{"step": 2, "valid": {"loss": 2.25, "accuracy": 0.5}}
"""
ATTEMPTS = """
{"time": 0.0, "from_step": 0, "workers": [{"pid": 1}]}
{"time": 60.0, "from_step": 1, "workers": [{"pid": 2}]}
"""
RESTARTS = """
{"time": 30.0, "workers": {"0": "it died"}}
"""
FILES = {"metrics.jsonl": METRICS, "attempts.jsonl": ATTEMPTS, "restarts.jsonl": RESTARTS}


def test_a_run_s_rows_become_charts(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text.lstrip())
    found = {panel.title: panel for panel in training_panels(RunDirectory(tmp_path))}
    assert [trace["y"] for trace in found["Loss"].traces] == [[2.5, 2.0], [2.25]]
    assert found["Held-out accuracy"].traces[0]["y"] == [0.5]
    assert found["Throughput"].traces[0]["y"] == [8.0]
    assert found["Bytes sent"].traces[0]["x"] == [2]
    assert [row[1:] for row in found["Events"].rows] == [
        ["attempt from step 0", "1 worker(s)"],
        ["restart", "worker 0: it died"],
        ["attempt from step 1", "1 worker(s)"],
    ]


@settings(max_examples=100)
@given(data=st.data())
def test_whatever_is_in_the_files_is_reported_or_left_out(
    data: st.DataObject, changed_rows: Callable[[str], st.SearchStrategy[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """They may be of a fetched run."""
    folder = tmp_path_factory.mktemp("damaged")
    for name, text in FILES.items():
        (folder / name).write_text(data.draw(changed_rows(text)))
    render("train", "", {}, training_panels(RunDirectory(folder)))
