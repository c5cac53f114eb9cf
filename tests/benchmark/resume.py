"""Random kills: does a run that is killed end as one that nobody touched, and how soon does it train again?

    python tests/benchmark/resume.py [--sync delayed-averaging]

Each trial runs `raytrain train` and, at a random moment after training has begun, sends SIGKILL to a random worker or
to the command itself. A killed worker is started again by the run itself; a killed command is run again with --resume.
The final weights are compared with those of an untouched run, bit by bit. The recovery of a worker is the time from the
kill to the first step after it; that of a command includes starting Python and Ray. The workers of a killed command go
on until Ray ends them, so a run that is killed late may have nothing left to do: then it is the time to the end.

With `--sync delayed-averaging` the workers take local steps and an all-reduce is in flight at any time (`sync.delay =
sync.every`), and only workers are killed, ten times: how long the others waited for the dead one is the time from the
kill to the end of the attempt, which is to be less than `sync.timeout_seconds`.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from bench import finish, parse, parser_of

from raytrain.run.checkpoint import list_checkpoints, load_part
from raytrain.run.rows import read_jsonl

WORDS = [
    "task.dropout=0.1", "task.norm=batch", "workers=2", "steps=800", "batch=16", "resources.cpus=1",
    "checkpoint.every=50", "evaluation.every=300", "log.every=1", "sync.timeout_seconds=30",
]  # fmt: skip
SYNC = {
    "ddp": ["ema=0.99"],
    "delayed-averaging": ["sync.name=delayed-averaging", "sync.every=12", "sync.delay=12", "sync.compression=int8"],
}


def start(out: Path, sync: str, *more: str) -> subprocess.Popen[bytes]:
    """Start the command on the run in `out`."""
    words = [sys.executable, "-m", "raytrain", "train", "digits", *WORDS, *SYNC[sync], "--out", str(out), *more]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def last_step(out: Path) -> int:
    """Return the last step in the log."""
    return max((row["step"] for row in read_jsonl(out / "metrics.jsonl")), default=0)


def wait_for(done: Callable[[], bool], command: subprocess.Popen[bytes], seconds: float = 200.0) -> None:
    """Wait until `done()`, or raise if the command ends or takes too long before."""
    give_up = time.monotonic() + seconds
    while not done():
        if command.poll() is not None or time.monotonic() > give_up:
            raise RuntimeError(f"the command ended with {command.poll()} or took too long")
        time.sleep(0.01)


def trial(out: Path, sync: str, seed: int) -> dict[str, object]:
    """Kill something at a random step of a new run, let it recover, and tell how that went."""
    draw = random.Random(seed)
    victims = ["worker 0", "worker 1", *(["command"] if sync == "ddp" else [])]
    at, victim = draw.randrange(20, 700), draw.choice(victims)
    command = start(out, sync)
    wait_for(lambda: last_step(out) >= at, command)
    killed_at = last_step(out)
    attempts = len(read_jsonl(out / "attempts.jsonl"))
    killed = time.monotonic()
    if victim == "command":
        os.kill(command.pid, signal.SIGKILL)
        command.wait()
        command = start(out, sync, "--resume")
    else:
        workers = [psutil.Process(worker["pid"]) for worker in read_jsonl(out / "attempts.jsonl")[-1]["workers"]]
        workers[int(victim[-1])].kill()
        psutil.wait_procs(workers, timeout=120)
    ended = time.monotonic() - killed
    wait_for(lambda: len(read_jsonl(out / "attempts.jsonl")) > attempts, command)
    resumed_from = read_jsonl(out / "attempts.jsonl")[-1]["from_step"]
    wait_for(lambda: last_step(out) > resumed_from or command.poll() == 0, command)  # they may have come to the end
    recovery = time.monotonic() - killed
    status = command.wait(timeout=300)
    return {
        "seed": seed,
        "victim": victim,
        "step": killed_at,
        "from_step": resumed_from,
        "seconds_to_end": ended,
        "seconds": recovery,
        "status": status,
    }


def final(out: Path) -> dict[str, torch.Tensor]:
    """Return the weights, their average and the optimizer's state at the end of a run."""
    saved = load_part(list_checkpoints(out / "checkpoints")[-1], 0)
    moments = {
        f"{name} {key}": value for name, state in saved["optimizer"]["state"].items() for key, value in state.items()
    }
    averaged = {f"average {name}": value for name, value in saved["ema"].items()}
    return {**saved["model"], **averaged, **moments}


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--sync", choices=SYNC, default="ddp")
    options = parse(parser)
    trials, table = {"ddp": 20, "delayed-averaging": 10}[options.sync], []
    with tempfile.TemporaryDirectory() as folder:
        untouched = Path(folder) / "untouched"
        if start(untouched, options.sync).wait(timeout=300):
            raise RuntimeError("the run that nobody touches failed")
        expected = final(untouched)
        for seed in range(5 if options.quick else trials):
            out = Path(folder) / f"trial-{seed}"
            row = trial(out, options.sync, seed)
            found = final(out)
            row["bit_equal"] = found.keys() == expected.keys() and all(
                torch.equal(found[name], expected[name]) for name in found
            )
            table.append(row)
            print(row, flush=True)
    seconds = {
        victim: [row["seconds"] for row in table if row["victim"].startswith(victim)]
        for victim in ("worker", "command")
    }
    headline = {
        "kills": len(table),
        "bit_equal": sum(row["bit_equal"] for row in table),
        "longest_attempt_after_kill_seconds": max(row["seconds_to_end"] for row in table if row["victim"] != "command"),
        "median_recovery_seconds": statistics.median(row["seconds"] for row in table),
        **{
            f"median_recovery_seconds_{victim}": statistics.median(values)
            for victim, values in seconds.items()
            if values
        },
    }
    finish("resume" if options.sync == "ddp" else f"resume-{options.sync}", table, headline, options)


if __name__ == "__main__":
    main()
