"""Of a run that ended or still goes on, read from its folder: how it ended, and its model."""

from typing import Any

from federated.build import Federation
from federated.server import Server
from raytrain.kinds import Result
from raytrain.rundir import RunDirectory, rows


def result_of(federation: Federation, server: Server, run: RunDirectory, error: str) -> Result:
    """Return how a run ended.

    Args:
        federation: of the run.
        server: as it is now.
        run: the folder.
        error: why it failed; "": it did not.
    """
    recorded = rows(run.metrics)
    evaluations = [row for row in recorded if "valid" in row]
    last: dict[str, Any] = next((row for row in reversed(recorded) if "valid" not in row), {})
    return Result(
        status="failed" if error else "done" if server.is_done() else "interrupted",
        metrics=evaluations[-1]["valid"] if evaluations else {},
        references=federation.task.references(),
        steps=server.model.version,
        seconds=last.get("seconds", 0.0),
        bytes_sent=last.get("bytes_down", 0) + last.get("bytes_up", 0),
        error=error,
    )
