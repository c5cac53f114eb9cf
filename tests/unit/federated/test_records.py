"""The rows of a federated run that goes on, whatever became of them in between."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.evaluation import KeepScores
from federated.records import RunRecords
from raytrain.run.directory import RunDirectory
from raytrain.run.rows import read_jsonl

FILES = {
    "metrics.jsonl": """
{"step": 1, "seconds": 2.0, "bytes_down": 9, "bytes_up": 2, "payloads": 3, "reports": 1, "heard": 2}
{"step": 1, "valid": {"loss": 2.0, "accuracy": 0.1}}
{"step": 2, "seconds": 5.0, "bytes_down": 30, "bytes_up": 5, "payloads": 6, "reports": 2, "heard": 1}
""",
    "rounds.jsonl": """
{"round": 0, "heard": [1, 4], "missing": {"7": "no answer"}, "refusals": [], "late": []}
{"round": 1, "heard": [2], "missing": {"3": "no answer"}, "refusals": ["client 5: wrong"], "late": ["client 7: late"]}
""",
}


@dataclass
class Model:
    """A model that one round has made."""

    version: int = 1

    def is_done(self) -> bool:
        return False

    def evaluate(self, keep: KeepScores) -> dict[str, float]:
        return {"loss": 1.0}

    def save_model(self, folder: Path) -> None:
        """Keep nothing."""


def go_on(folder: Path) -> list[int]:
    with RunRecords(RunDirectory(folder), Model(), every=0):
        pass
    return [row["round"] for row in read_jsonl(folder / "rounds.jsonl")]


def test_rows_of_rounds_that_the_state_does_not_know_of_are_dropped(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text.lstrip())
    assert go_on(tmp_path) == [0]
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 1]


@settings(max_examples=100)
@given(data=st.data())
def test_a_run_goes_on_whatever_became_of_its_rows(
    data: st.DataObject, changed_rows: Callable[[str], st.SearchStrategy[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    for name, text in FILES.items():
        (folder / name).write_text(data.draw(changed_rows(text)))
    assert all(number < 1 for number in go_on(folder))
