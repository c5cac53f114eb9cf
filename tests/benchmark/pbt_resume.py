"""Kills of a search: does a search that is killed make the decisions of one that nobody touched?

    python tests/benchmark/pbt_resume.py

Each trial runs `raytrain search` and sends SIGKILL at a random moment, to the command or to one of the processes that
train. A killed command is run again with --resume; a killed process is replaced by the search itself. The lineage, with
all its hashes, and the winner's state are compared with those of an untouched search, byte by byte.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from bench import arguments, finish

WORDS = [
    "base.steps=240", "search.interval=30", "slots=2", "search.population=6", "base.task.model=mlp",
    "base.task.widths=[32]", "search.max_failures=20", 'base.callbacks=["pbt_resume:pace"]',
]  # fmt: skip
REPORTS = 6 * 240 // 30


def pace(replica: object) -> None:  # noqa: ARG001 - a callback of the base recipe
    """Slow a step down, so that kills come in the middle of segments."""
    time.sleep(0.01)


def start(out: Path) -> subprocess.Popen[bytes]:
    """Start the search in `out`, or go on with it."""
    begun = (out / "recipe.toml").is_file()
    words = [str(out), "--resume"] if begun else ["digits-pbt", *WORDS, "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-m", "raytrain", "search", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parent,
        start_new_session=True,
    )


def reports(out: Path) -> int:
    """Return how many segments have ended."""
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def trainers(command: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the processes that train."""
    children = psutil.Process(command.pid).children(recursive=True)
    return [child for child in children if "TrialActor" in " ".join(child.cmdline())]


def kill(out: Path, seed: int) -> dict[str, object]:
    """Kill something at a random moment of a new search, let it end, and tell how that went."""
    draw = random.Random(seed)
    at, victim = draw.randrange(1, REPORTS - 2), draw.choice(["command", "process"])
    command = start(out)
    while reports(out) < at:
        if command.poll() is not None:
            raise RuntimeError(f"the search ended with {command.poll()}")
        time.sleep(0.01)
    time.sleep(draw.random() / 2)
    if victim == "command":
        os.kill(command.pid, signal.SIGKILL)
        command.wait()
        command = start(out)
    elif working := trainers(command):
        draw.choice(working).kill()
    killed = time.monotonic()
    status = command.wait(timeout=600)
    return {"seed": seed, "victim": victim, "reports": at, "status": status, "seconds": time.monotonic() - killed}


def results(out: Path) -> tuple[bytes, str]:
    """Return the lineage, and a hash of the winner's weights."""
    [state] = (out / "best" / "checkpoints").glob("step-*/rank-00000.safetensors")
    return (out / "lineage.jsonl").read_bytes(), hashlib.sha256(state.read_bytes()).hexdigest()


def main() -> None:
    """Measure and report."""
    options, table = arguments(__doc__.partition("\n")[0]), []
    with tempfile.TemporaryDirectory() as folder:
        untouched = Path(folder) / "untouched"
        if start(untouched).wait(timeout=600):
            raise RuntimeError("the search that nobody touches failed")
        lineage, winner = results(untouched)
        for seed in range(2 if options.quick else 20):
            out = Path(folder) / f"trial-{seed}"
            row = kill(out, seed)
            found = results(out)
            table.append({**row, "equal_log": found[0] == lineage, "equal_winner": found[1] == winner})
            print(table[-1], flush=True)
    headline = {
        "kills": len(table),
        "equal_logs": sum(bool(row["equal_log"]) for row in table),
        "equal_winner_digest": sum(bool(row["equal_winner"]) for row in table),
    }
    finish("pbt_resume", table, headline, options)


if __name__ == "__main__":
    main()
