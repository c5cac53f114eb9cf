"""Our loop in a worker against a bare PyTorch loop: the same model, batch, optimizer and threads.

    python tests/benchmark/loop_overhead.py

Pairs of runs, one of each, in turn. A bare run is a process of its own with the loop that nanoGPT's `train.py` has:
windows at random offsets, mean cross-entropy, clipping, AdamW, a schedule; it logs the loss every ten steps. Ours is
`raytrain train` with one worker. Both run with the settings of malloc that our workers have: they spare any loop page
faults, and are not what is measured here. Steps per second are those after a warm-up. Memory is the peak of the process
that trains minus its resident size just before the model is built.
"""

import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench import arguments, finish, median_and_interval
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from raytrain.launch.forkserver import WORKER_ENVIRONMENT
from raytrain.optim.schedules import cosine, lr_factor
from raytrain.run.rows import read_jsonl
from raytrain.tasks.task import Task
from raytrain.tasks.text import TextOptions, text
from raytrain.training.replica import Replica

BATCH, BLOCK, WARM_UP = 12, 64, 50
MADV_POPULATE_READ = 22
MODEL = {"model": "gpt", "layers": 4, "heads": 4, "width": 128, "block": BLOCK, "valid": 0.002}


def resident_bytes() -> int:
    """Return the memory that this process holds now, with all of the libraries that it has mapped.

    A forked process has only those parts of a library in its memory that it has touched: without this, what it touches
    later would count as memory of the loop.
    """
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, _, _, inode, *_ = line.split()
        first, last = (int(address, 16) for address in addresses.split("-"))
        if rights.startswith("r") and inode != "0":
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_POPULATE_READ)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Return the most memory that this process held at any time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bare(steps: int, threads: int) -> dict[str, float]:
    """Train with a loop written by hand; return steps per second and memory."""
    torch.set_num_threads(threads)
    task = text(TextOptions(name="text", **MODEL))
    before = resident_bytes()
    module = task.model(0).train()
    stream = task.data("train")._stream
    decayed = [value for value in module.parameters() if value.dim() >= 2]
    others = [value for value in module.parameters() if value.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    schedule = partial(lr_factor, cosine, steps=steps, warmup=100, min_lr_ratio=0.1, decay_ratio=0.2)
    for step in range(steps):
        if step == WARM_UP:
            started = time.perf_counter()
        starts = torch.randint(len(stream) - BLOCK, (BATCH,)).tolist()
        windows = torch.from_numpy(np.stack([stream[at : at + BLOCK + 1] for at in starts]).astype(np.int64))
        logits = module(input_ids=windows[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        clip_grad_norm_(module.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * schedule(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            loss.item()
    seconds = time.perf_counter() - started
    return {"steps_per_second": (steps - WARM_UP) / seconds, "bytes": float(peak_bytes() - before)}


def ours(steps: int, threads: int) -> dict[str, float]:
    """Train the same with `raytrain train`; return steps per second and memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        changes = {
            **{f"task.{name}": value for name, value in MODEL.items()},
            "task.name": "loop_overhead:noted",
            "steps": steps,
            "batch": BATCH,
            "optimizer.lr": 1e-3,
            "optimizer.weight_decay": 0.1,
            "optimizer.betas": [0.9, 0.99],
            "schedule.warmup": 100,
            "schedule.min_lr_ratio": 0.1,
            "evaluation.every": 0,
            "checkpoint.every": 0,
            "resources.cpus": threads,
            "callbacks": ["loop_overhead:note_peak"],
        }
        recipe = Path(folder) / "bare.toml"
        recipe.write_text("")
        words = [f"{field}={value}" for field, value in changes.items()]
        subprocess.run(
            [sys.executable, "-m", "raytrain", "train", str(recipe), *words, "--out", str(out)],
            check=True,
            cwd=Path(__file__).parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"LOOP_OVERHEAD_NOTES": folder},
        )
        log = [row for row in read_jsonl(out / "metrics.jsonl") if "loss" in row and row["step"] >= WARM_UP]
        notes = [int((Path(folder) / name).read_text()) for name in ("before", "peak")]
    steps_done, seconds = (log[-1][key] - log[0][key] for key in ("step", "seconds"))
    return {"steps_per_second": steps_done / seconds, "bytes": float(notes[1] - notes[0])}


class NotedOptions(TextOptions):
    """The options of `text`."""


def noted(options: NotedOptions) -> Task:
    """Return the task `text`, whose worker notes its memory before the model is built."""
    task = text(options)

    def model(seed: int) -> nn.Module:
        (Path(os.environ["LOOP_OVERHEAD_NOTES"]) / "before").write_text(str(resident_bytes()))
        return task.model(seed)

    return replace(task, model=model)


def note_peak(replica: Replica) -> None:
    """Note the peak once in a while, so rarely that it costs nothing."""
    if replica.progress.step % 50 == 0:
        (Path(os.environ["LOOP_OVERHEAD_NOTES"]) / "peak").write_text(str(peak_bytes()))


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__.partition("\n")[0])
    pairs, steps = (3, 350) if options.quick else (7, 650)
    table = []
    for threads in (1,) if options.quick else (1, 2):
        measured = {"bare": [], "ours": []}
        for _ in range(pairs):
            alone = [sys.executable, __file__, "--bare", str(steps), str(threads)]
            measured["bare"].append(
                json.loads(
                    subprocess.run(
                        alone, check=True, capture_output=True, text=True, env=os.environ | WORKER_ENVIRONMENT
                    ).stdout
                )
            )
            measured["ours"].append(ours(steps, threads))
        ratios = {
            key: median_and_interval(
                [one[key] / other[key] for one, other in zip(measured["ours"], measured["bare"], strict=True)]
            )
            for key in ("steps_per_second", "bytes")
        }
        for name, values in measured.items():
            speed, memory = (
                median_and_interval([value[key] for value in values])["median"] for key in ("steps_per_second", "bytes")
            )
            table.append({"loop": name, "threads": threads, "steps_per_second": speed, "megabytes": memory / 1e6})
        for key, ratio in ratios.items():
            table.append({"loop": f"ours / bare, {key}", "threads": threads, **ratio})
    columns = list(dict.fromkeys(key for row in table for key in row))
    table = [{column: row.get(column, "") for column in columns} for row in table]
    headline = {
        "ratio_to_bare_loop": next(row["median"] for row in table if row["loop"] == "ours / bare, steps_per_second"),
        "memory_ratio": next(row["median"] for row in table if row["loop"] == "ours / bare, bytes"),
    }
    finish("loop_overhead", table, headline, options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        print(json.dumps(bare(int(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
