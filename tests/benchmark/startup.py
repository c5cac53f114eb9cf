"""What it takes to start: seconds and processor seconds of `raytrain train digits steps=6`, beside a bare TorchTrainer.

    python tests/benchmark/startup.py

In turns, each when the machine is at rest, with one worker and with two: ours on this machine, without Ray; ours on a
Ray cluster that runs; a `ray.train.torch.TorchTrainer` that starts a Ray of its own, as `ray.init` does; and the same
on the cluster that runs. The TorchTrainer trains a model of the same size for as many steps, on random numbers, and
reports once.

Processor seconds are those of the command and of all processes that come of it, until the last of them has ended; on
the cluster that runs, those of its processes too. The first step is noted by the first worker. Imports are timed in a
process of their own, in the same turns: what `raytrain train` imports before it can train.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from bench import arguments, finish, median_and_interval
from measured import FIRST_STEP

HERE = Path(__file__).resolve()
STEPS = 6
RECIPE = ["train", "digits", f"steps={STEPS}", "task.widths=[4]", "evaluation.every=0", "callbacks=['measured:note']"]
BUSY_PERCENT = 15
"""Of all cores; a Ray cluster that waits takes less."""
IMPORTS = "import raytrain.cli.main, raytrain.training.recipe, raytrain.launch.elastic"


def bare(workers: int, address: str | None) -> None:
    """Train a model of the same size by a TorchTrainer, as its documentation has it."""
    import ray  # noqa: PLC0415 - only here
    import ray.train  # noqa: PLC0415
    from ray.train.torch import TorchConfig, TorchTrainer  # noqa: PLC0415

    ray.init(address or "local", include_dashboard=None if address else False, log_to_driver=False)
    scaling = ray.train.ScalingConfig(num_workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        run = ray.train.RunConfig(storage_path=folder)
        config = {"note": str(FIRST_STEP)}
        torch_config = TorchConfig(backend="gloo")
        trainer = TorchTrainer(
            bare_loop, train_loop_config=config, torch_config=torch_config, scaling_config=scaling, run_config=run
        )
        trainer.fit()


def bare_loop(config: dict[str, Any]) -> None:
    """Train as one of the workers of the TorchTrainer."""
    import ray.train  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from ray.train.torch import prepare_model  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = prepare_model(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        loss = nn.functional.cross_entropy(model(torch.randn(32, 1, 8, 8)), torch.randint(10, (32,)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0 and ray.train.get_context().get_world_rank() == 0:
            Path(config["note"]).write_text(repr(time.time()))
    ray.train.report({"loss": loss.item()})


@contextmanager
def head() -> Iterator[tuple[str, int]]:
    """Run a Ray cluster of this machine inside the `with` block, and yield its address and its process."""
    from ray.util import get_node_ip_address  # noqa: PLC0415 - only here

    host = get_node_ip_address()  # for which Ray takes 127.0.0.1 too, wherever the cluster listens
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    words = ["start", "--head", "--block", f"--port={port}", "--num-cpus=2", f"--node-ip-address={host}"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", *words, "--include-dashboard=false"]
    process = subprocess.Popen(
        ray, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(HERE.parent)}
    )
    try:
        wait_for(host, port)
        yield f"{host}:{port}", process.pid
    finally:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def wait_for(host: str, port: int) -> None:
    """Wait until something listens on a port."""
    for _ in range(1200):
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on port {port}")


def settle() -> None:
    """Wait until this machine is at rest, at most a minute: a Ray that listens goes on starting processes."""
    give_up = time.monotonic() + 60
    while psutil.cpu_percent(1.0) > BUSY_PERCENT and time.monotonic() < give_up:
        pass


def timed(name: str, workers: int, address: str, cluster: int) -> dict[str, float]:
    """Run one of the commands, and return what `measure` prints, with the processor seconds of the cluster."""
    with tempfile.TemporaryDirectory() as folder:
        ours = [sys.executable, "-m", "raytrain", *RECIPE, f"workers={workers}", "--out", f"{folder}/run"]
        theirs = [sys.executable, str(HERE), "--bare", str(workers)]
        words = {
            "ours": ours,
            "ours on a cluster": [*ours, "--address", address],
            "TorchTrainer": theirs,
            "TorchTrainer on a cluster": [*theirs, address],
        }[name]
        also = cluster if "cluster" in name else 0
        ended = subprocess.run(
            [sys.executable, str(HERE.with_name("measured.py")), str(also), *words],
            cwd=HERE.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
        if found.pop("status"):
            raise RuntimeError(ended.stderr)
        return found


def alone(*words: str) -> tuple[float, float]:
    """Return the seconds and the processor seconds of a command without children."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, used


def rows_of(measured: dict[tuple[str, int], list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Return a row of medians for each command."""
    return [
        {
            "command": name,
            "workers": workers,
            **{f"{key}_seconds": statistics.median(one[key] for one in runs) for key in ("first_step", "exit", "cpu")},
            "runs": len(runs),
        }
        for (name, workers), runs in measured.items()
    ]


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__.partition("\n")[0])
    turns, sizes = (1, (2,)) if options.quick else (3, (1, 2))
    names = ("ours", "TorchTrainer", "ours on a cluster", "TorchTrainer on a cluster")
    measured: dict[tuple[str, int], list[dict[str, float]]] = {(name, size): [] for size in sizes for name in names}
    imports, checks, lists = [], [], []
    with head() as (address, cluster):
        for _ in range(turns):
            for (name, size), runs in measured.items():
                settle()
                runs.append(timed(name, size, address, cluster))
            settle()
            imports.append(alone("-c", IMPORTS)[0])
            checks.append(alone("-m", "raytrain", "check", "digits")[1])
            lists.append(alone("-m", "raytrain", "list")[1])
    table = rows_of(measured)
    found = {(row["command"], row["workers"]): row for row in table}

    def over_bare(where: str) -> float:
        pairs = zip(measured[f"ours{where}", 2], measured[f"TorchTrainer{where}", 2], strict=True)
        return median_and_interval([one["cpu"] / other["cpu"] for one, other in pairs])["median"]

    first = found["ours", 2]["first_step_seconds"]
    headline = {
        "cpu_over_bare_torchtrainer": over_bare(""),
        "cpu_over_bare_torchtrainer_on_a_cluster": over_bare(" on a cluster"),
        "first_step_seconds": first,
        "exit_seconds": found["ours", 2]["exit_seconds"],
        "imports_share_of_first_step": statistics.median(imports) / first,
        "check_seconds": statistics.median(checks),
        "list_seconds": statistics.median(lists),
    }
    finish("startup", table, headline, options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        bare(int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
    else:
        main()
