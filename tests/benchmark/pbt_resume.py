"""Kills of a search: does a search that is killed make the decisions of one that nobody touched?

    python tests/benchmark/pbt_resume.py

Each search is `raytrain search`, and gets SIGKILLs at random moments: of the command, of a process that trains, or of
all processes at once, as if the machine had lost power. A command that is gone is run again with --resume; a killed
process is replaced by the search itself. At its end the lineage, with all its hashes, is compared byte by byte with
that of a search in this process that nobody touched, and so is the hash of the winner's state. An asynchronous search
decides by the order of arrivals, so the untouched one follows the order in the lineage. The kills of a search share its
verdict.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from bench import arguments, finish

from raytrain.recipe import read_toml
from search.journal.journal import Journal
from search.launch.base import check_search
from search.launch.trial import Trial
from search.recipe import SearchRecipe
from search.scheduling.driver import drive

WORDS = [
    "base.steps=240", "search.interval=30", "slots=2", "search.population=6", "base.task.model=mlp",
    "base.task.widths=[32]", "search.max_failures=20", 'base.callbacks=["pbt_resume:pace"]',
]  # fmt: skip
REPORTS = 6 * 240 // 30
SEARCHES = {True: (5, 5), False: (5, 5)}
"""Kills of each search, by whether it is synchronous."""
QUICK = {True: (2,), False: (1,)}
VICTIMS = ("command", "process", "all")


def pace(replica: object) -> None:  # noqa: ARG001 - a callback of the base recipe
    """Slow a step down, so that kills come in the middle of segments."""
    time.sleep(0.01)


def start(out: Path, *, synchronous: bool) -> subprocess.Popen[bytes]:
    """Start the search in `out`, or go on with it."""
    begun = (out / "recipe.toml").is_file()
    new = ["digits-pbt", *WORDS, f"search.synchronous={str(synchronous).lower()}", "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-m", "raytrain", "search", *([str(out), "--resume"] if begun else new)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parent,
        start_new_session=True,
    )


def reports(out: Path) -> int:
    """Return how many segments have ended."""
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def kill(command: subprocess.Popen[bytes], victim: str, draw: random.Random) -> None:
    """Send SIGKILL to a victim; the processes that train are the grandchildren of the command."""
    processes = psutil.Process(command.pid).children(recursive=True)
    children = {process.pid for process in processes if process.ppid() == command.pid}
    if victim == "process":
        processes = [draw.choice([process for process in processes if process.pid not in children])]
    else:
        command.kill()
    for process in processes if victim != "command" else ():
        process.send_signal(signal.SIGKILL)
    if victim != "process":
        command.wait()


def search_with_kills(out: Path, kills: int, seed: int, *, synchronous: bool) -> list[dict[str, object]]:
    """Search, kill at random moments, let it end, and return a row for each kill."""
    draw, rows = random.Random(seed), []
    command = start(out, synchronous=synchronous)
    for at in sorted(draw.sample(range(1, REPORTS - 4), kills)):
        while reports(out) < at:
            if command.poll() is not None:
                raise RuntimeError(f"the search ended with {command.poll()}")
            time.sleep(0.01)
        time.sleep(draw.random() / 2)
        victim = draw.choice(VICTIMS)
        kill(command, victim, draw)
        if victim != "process":
            command = start(out, synchronous=synchronous)
        rows.append({"synchronous": synchronous, "search": seed, "victim": victim, "reports": at})
    if status := command.wait(timeout=300):
        raise RuntimeError(f"the search ended with {status}")
    return rows


def untouched(folder: Path, killed: Path, *, synchronous: bool) -> Journal:
    """Search in this process, with the recipe of a search that was killed, and return what it has decided."""
    recipe = SearchRecipe.parse_with(read_toml(str(killed), [])[0], {"base.callbacks": []})
    checked = check_search(recipe)
    scheduler = checked.recipe.scheduler(checked.objective)
    if not synchronous:
        scheduler.follow([json.loads(line) for line in (killed / "lineage.jsonl").read_text().splitlines()])
    folder.mkdir()
    journal = Journal(folder, scheduler)
    journal.open()
    drive(journal, journal.store, Trial(checked.base, torch.device("cpu"), lambda step: None).train)
    return journal


def winner(folder: Path) -> str:
    """Return the hash of the state of the best model."""
    best = json.loads((folder / "state.json").read_text())["state"]["scheduler"]["best"]
    return str(best["snapshot"][0])


def main() -> None:
    """Measure and report."""
    options, table = arguments(__doc__.partition("\n")[0]), []
    torch.set_num_threads(1)  # as in a slot of one CPU; sums depend on it
    plan = QUICK if options.quick else SEARCHES
    runs = [(synchronous, kills) for synchronous in plan for kills in plan[synchronous]]
    with tempfile.TemporaryDirectory() as folder:
        for seed, (synchronous, kills) in enumerate(runs):
            out, plain = Path(folder) / f"killed-{seed}", Path(folder) / f"untouched-{seed}"
            began = time.monotonic()
            rows = search_with_kills(out, kills, seed, synchronous=synchronous)
            seconds = time.monotonic() - began
            journal = untouched(plain, out, synchronous=synchronous)
            equal_log = (out / "lineage.jsonl").read_bytes() == journal.lineage.path.read_bytes()
            verdict = {"equal_log": equal_log, "equal_winner": winner(out) == winner(plain), "seconds": seconds}
            table += [{**row, **verdict} for row in rows]
            print(verdict, flush=True)
    headline = {
        "kills": len(table),
        "equal_logs": sum(bool(row["equal_log"]) for row in table),
        "equal_winner_digest": sum(bool(row["equal_winner"]) for row in table),
    }
    finish("pbt_resume", table, headline, options)


if __name__ == "__main__":
    main()
