"""What a run leaves on the disk beside the server's state: rows of rounds and evaluations, and the model as seeds."""

import csv
import io
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from federated.evaluation import ClientScore, KeepScores
from federated.partition import Partition, label_counts
from federated.server import CommunicationRound
from raytrain.files import AppendOnlyFile, write_atomic
from raytrain.json_files import to_json
from raytrain.run.directory import RunDirectory
from raytrain.run.metrics import MetricsWriter
from raytrain.run.rows import read_jsonl
from raytrain.tasks.task import Examples

ROUNDS, SEEDS, PARAMETERS = "rounds.jsonl", "seeds.safetensors", "parameters.safetensors"
"""In a run's folder: who was heard in each round, and the newest model that was evaluated, in one of two forms."""
CLIENTS, PARTITION = "clients.csv", "partition.json"
"""In a run's folder: what this model is worth to each client that evaluated it, and the labels of clients."""
CLIENTS_SHOWN = 100
"""Whose labels the report page shows."""
TOTALS = ("bytes_down", "bytes_up", "payloads", "reports")
"""What the row of a round in `metrics.jsonl` sums over all rounds."""


@with_config(ConfigDict(extra="allow"))
class RoundRow(TypedDict):
    """A row of `rounds.jsonl`; see `row_of`."""

    round: int
    missing: dict[str, str]
    refusals: list[str]
    late: list[str]


class RecordedModel(Protocol):
    """The model of a run that goes on."""

    @property
    def version(self) -> int:
        """Return how many rounds made it."""
        ...

    def is_done(self) -> bool:
        """Return whether these are all."""
        ...

    def evaluate(self, keep: KeepScores) -> dict[str, float]:
        """Return what the task measures of it, after `keep` was called with the scores of clients, if there are any."""
        ...

    def save_model(self, folder: Path) -> None:
        """Write it to a folder."""
        ...


class RunRecords:
    """Writes the rows of a run, after dropping those of rounds that its state does not know of.

    A round is recorded before the state is saved, so a run that was killed in between records it again.

    Args:
        run: the folder.
        model: of the run, at the round that it begins at or goes on from.
        every: rounds between evaluations; 0: at the end only.
    """

    def __init__(self, run: RunDirectory, model: RecordedModel, *, every: int) -> None:
        self._model, self._every = model, every
        self._folder, version = run.path, model.version
        played = [row for row in read_jsonl(run.metrics) if all(type(row.get(name)) is int for name in TOTALS)]
        before: Mapping[str, Any] = next((row for row in reversed(played) if row["step"] <= version), {})
        self._total = {name: before.get(name, 0) for name in TOTALS}
        self._began = time.monotonic() - before.get("seconds", 0.0)
        self._recorder = MetricsWriter(run, version, version or -1, [])  # w0 is evaluated again
        self._rounds = _kept(run.path / ROUNDS, version)

    def __enter__(self) -> Self:
        """Evaluate w0, at the start of a run, and return this."""
        if not self._model.version:
            self._measure()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the files."""
        self._recorder.close(failed=kind is not None)
        self._rounds.close()

    def add(self, done: CommunicationRound) -> None:
        """Write the rows of a round that is aggregated and not yet saved."""
        self._rounds.write(f"{to_json(row_of(done))}\n".encode())
        for name in self._total:
            self._total[name] += getattr(done, name)
        self._recorder.write(
            {
                "step": done.number + 1,
                "seconds": round(time.monotonic() - self._began, 3),
                **self._total,
                "heard": len(done.heard),
                "missing": len(done.missing),
                "refused": done.refused,
                "late": len(done.late),
            }
        )
        if self._model.is_done() or (self._every and (done.number + 1) % self._every == 0):
            self._measure()
        self._rounds.fsync()
        self._recorder.keep()

    def _measure(self) -> None:
        keep = partial(write_scores, self._folder / CLIENTS)
        self._recorder.write({"step": self._model.version, "valid": self._model.evaluate(keep)})
        self._model.save_model(self._folder)


def write_scores(path: Path, scores: Sequence[ClientScore]) -> None:
    """Write what the newest model is worth to clients: a line of CSV for each that evaluated it."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for score in scores for name in score.metrics))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["client", "examples", *names])
    writer.writerows(
        [score.client, score.examples, *(score.metrics.get(name, "") for name in names)] for score in scores
    )
    write_atomic(path, text.getvalue().encode())


def write_partition(path: Path, partition: Partition, examples: Examples) -> None:
    """Write the labels of the first clients, for the report page."""
    clients = min(partition.clients, CLIENTS_SHOWN)
    write_atomic(path, to_json({"clients": clients, "labels": label_counts(partition, examples, clients)}).encode())


def row_of(done: CommunicationRound) -> dict[str, Any]:
    """Return what `rounds.jsonl` says of a round."""
    return {
        "round": done.number,
        "heard": sorted(done.heard),
        "used": len(done.used),
        "missing": {str(client): reason for client, reason in sorted(done.missing.items())},
        "refused": done.refused,
        "refusals": done.refusals,
        "late": [str(answer) for answer in done.late],
        "bytes_down": done.bytes_down,
        "bytes_up": done.bytes_up,
    }


def _kept(path: Path, version: int) -> AppendOnlyFile:
    """Return a file of rows, with those of the first rounds."""
    kept = [row for row in read_jsonl(path, RoundRow) if row["round"] < version]
    write_atomic(path, "".join(f"{to_json(row)}\n" for row in kept).encode())
    return AppendOnlyFile(path)
