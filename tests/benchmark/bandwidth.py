"""Two workers on a network of 10 to 1,000 Mbit/s: how much of the speed without any communication is left.

    python tests/benchmark/bandwidth.py          (as root on Linux: it makes network namespaces)

Each worker is a process on one core, in a network namespace of its own; the pair of interfaces between them is slowed
by `tc tbf` in both directions (latency is not changed). The raw rate is that of a plain TCP stream, measured first, and
bytes are those that the interface counted. eta is steps per second over those without communication, which are
measured before and after each other measurement; the default method is measured five times, and the median counts.
The ceiling is min(1, tau C / T), with C the seconds of a step without communication and T what the bytes of an exchange
take at the raw rate. Two models: the GPT of
`shakespeare-cpu`, and an MLP on digits with two layers of 1,024, wide and cheap per byte: 1.1 million parameters that
see 32 examples a step, so that an exchange at 100 Mbit/s takes as long as some dozens of steps.

Time to a held-out loss: the loss after a number of samples is measured once for averaged gradients and for the default
asynchronous method with the round that it chose at 100 Mbit/s, without a slow network; steps times the measured
seconds of a step is the time. One of these times is then measured from end to end. With `--quick`: two rates.
"""

import contextlib
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench import RESULTS, finish, parse, parser_of
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from raytrain.overrides import apply_overrides
from raytrain.run.rows import read_jsonl
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.interval import MAX_OVERHEAD
from raytrain.sync.transport import GroupTransport, LocalTransport
from raytrain.tasks.task import Task
from raytrain.testing import train_each_with_gloo
from raytrain.training.build import build_replica, build_task
from raytrain.training.evaluation import evaluate
from raytrain.training.loader import local_loader
from raytrain.training.loop import LoopConfig, backward, train
from raytrain.training.recipe import TrainRecipe
from raytrain.training.replica import Replica
from raytrain.training.segment import loop_config, loop_range

RATES = (10, 30, 100, 300, 1000)
PORT = 29700
TAU = 48
ENDLESS = 10**9

Fields = dict[str, Any]

MODELS: dict[str, Fields] = {
    "gpt": {
        "task": {"name": "text", "tokens": "chars", "model": "gpt", "layers": 4, "heads": 4, "width": 128, "block": 64},
        "batch": 12,
        "optimizer": {"name": "adamw", "lr": 4e-3, "betas": [0.9, 0.99], "weight_decay": 0.1},
        "schedule": {"name": "cosine", "warmup": 100, "min_lr_ratio": 0.1},
    },
    "mlp": {
        "task": {"name": "digits", "model": "mlp", "widths": [1024, 1024]},
        "batch": 32,
        "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
    },
}
ASYNC: Fields = {"name": "delayed-averaging", "every": "auto"}
METHODS: dict[str, Fields] = {
    "none": {"name": "ddp"},
    "ddp": {"name": "ddp"},
    "ddp-powersgd": {"name": "ddp"},
    "local-sgd": {"name": "local-sgd", "every": TAU},
    "diloco": {"name": "diloco", "every": TAU},
    "co2": {"name": "co2", "every": TAU},
    "delayed-averaging": ASYNC,
    "delayed-averaging-int8": {**ASYNC, "compression": "int8"},
}
ORDER = (
    *("delayed-averaging", "ddp", "ddp-powersgd", "delayed-averaging", "delayed-averaging-int8", "local-sgd"),
    *("delayed-averaging", "diloco", "delayed-averaging", "co2", "delayed-averaging-int8", "delayed-averaging"),
)


# What a worker does.


class Meter:
    """The loop's `Watch`: notes when steps and exchanges end, and stops when enough of them did."""

    def __init__(self, leads: bool, exchanges: bool, warmup: int, rounds: int, seconds: float) -> None:
        self._leads, self._exchanges = leads, exchanges
        self._warmup, self._rounds, self._seconds = warmup, rounds, seconds
        self._marks: list[tuple[int, float, float, int]] = []
        self._pace: dict[str, float] = {}
        self._bytes = 0

    def stop_requested(self) -> bool:
        """Return whether all that is wanted was seen, if this is the worker that leads or nothing is exchanged."""
        if self._exchanges and not self._leads:
            return False
        done = self._marks[self._warmup :]
        return len(done) > self._rounds and done[-1][1] - done[0][1] >= self._seconds

    def on_step(self, replica: Replica, values: dict[str, float]) -> None:
        """Note a step that ends with an exchange, or any step where there are none."""
        progress = replica.progress
        if progress.bytes_sent != self._bytes or not self._exchanges:
            self._bytes = progress.bytes_sent
            self._marks.append((progress.step, time.perf_counter(), progress.waited_seconds, wire_bytes()))
            names = ("every", "delay", "step_seconds", "exchange_cost_seconds")
            self._pace = {name: values.get(name, 0.0) for name in names}

    def evaluate(self, replica: Replica) -> dict[str, float]:
        """Measure nothing."""
        raise RuntimeError("this run evaluates nothing")

    def save(self, replica: Replica) -> None:
        """Write nothing, and wait for what is under way."""
        replica.sync.state_dict()

    def save_metrics(self, replica: Replica, metrics: dict[str, float]) -> None:
        """Write nothing."""

    def result(self) -> dict[str, float]:
        """Return what the window after the warm-up came to; it begins and ends with the end of an exchange."""
        first, last = self._marks[self._warmup], self._marks[-1]
        steps, seconds = last[0] - first[0], last[1] - first[1]
        return {
            "steps": steps,
            "seconds": seconds,
            "waited_seconds": last[2] - first[2],
            "bytes_per_step": (last[3] - first[3]) / steps,
            "rounds": len(self._marks) - 1 - self._warmup,
            **self._pace,
        }


class Evaluating:
    """The loop's `Watch` that evaluates at the end."""

    def __init__(self, task: Task, plan: LoopConfig) -> None:
        self._task, self._plan = task, plan
        self._result: dict[str, float] = {}

    def stop_requested(self) -> bool:
        """Return False: the plan says when."""
        return False

    def on_step(self, replica: Replica, values: dict[str, float]) -> None:
        """Note nothing."""

    def evaluate(self, replica: Replica) -> dict[str, float]:
        """Measure the held-out loss, each worker for itself."""
        alone = ExactAverager(LocalTransport())
        examples, precision = self._task.data("valid"), self._plan.autocast
        metrics = evaluate(self._task, replica.module, examples, 64, alone, autocast=precision)
        self._result = {"seconds": replica.progress.seconds, "loss": metrics["loss"]}
        return metrics

    def save(self, replica: Replica) -> None:
        """Write nothing."""

    def save_metrics(self, replica: Replica, metrics: dict[str, float]) -> None:
        """Write nothing."""

    def result(self) -> dict[str, float]:
        """Return the seconds of training and the loss."""
        return self._result


def wire_bytes() -> int:
    """Return what this worker's interface has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            return int(numbers.split()[8])
    return 0


def measure(order: Fields) -> dict[str, float]:
    """Train as the order says, and return what was measured."""
    method, recipe = order["method"], TrainRecipe.parse(order["recipe"])
    transport = LocalTransport() if method == "none" else GroupTransport(torch.device("cpu"), 300.0)
    replica = build_replica(recipe, task := build_task(recipe), ExactAverager(transport))
    plan = loop_config(recipe)
    if "pace" in order:
        replica.sync._interval.restore(*order["pace"])
    if "until" in order:
        plan = replace(plan, steps=order["until"])  # with the learning rates of the whole run
        meter: Meter | Evaluating = Evaluating(task, plan)
    else:
        meter = Meter(transport.rank == 0, method != "none", **order["window"])
    with local_loader(task, recipe.task, loop_range(replica, plan)) as feed:
        if method == "ddp-powersgd":
            train_with_power_sgd(replica, task, feed, plan, meter)
        else:
            train(replica, task, feed, plan, meter)
    transport.close()
    return meter.result()


class _Wrapped:
    """What `backward` calls on a synchroniser, for gradients that DistributedDataParallel averages by itself."""

    def begin(self, weight: float) -> float:
        return weight

    def before_backward(self) -> None:
        pass


def train_with_power_sgd(replica: Replica, task: Task, feed: Any, plan: LoopConfig, meter: Meter) -> None:
    """Train with torch's data-parallel wrapper and its PowerSGD hook, of rank 1, from the third step on.

    In one bucket: the hook sends from callbacks, and on gloo those of several buckets meet in the wrong order.
    """
    group = dist.new_group()
    module: nn.Module = DistributedDataParallel(replica.module, process_group=group, bucket_cap_mb=1000)
    module.register_comm_hook(PowerSGDState(group, matrix_approximation_rank=1, start_powerSGD_iter=2), powerSGD_hook)
    replica.module, replica.sync = module, _Wrapped()
    stop = torch.zeros(1)
    while not stop:
        backward(replica, task, feed, plan)
        replica.optimizer.step()
        replica.optimizer.zero_grad()
        replica.progress.step += 1
        replica.progress.position += plan.local_batch * replica.world_size
        replica.progress.bytes_sent += 1  # each step ends an exchange
        meter.on_step(replica, {})
        stop.fill_(meter.stop_requested() if replica.rank == 0 else 0.0)
        dist.all_reduce(stop)
    dist.destroy_process_group(group)


def raw_rate() -> float:
    """Return the bits per second of a TCP stream to the first worker, its first half second not counted."""
    if dist.get_rank() > 0:
        dist.barrier()
        with socket.create_connection((address(0), PORT + 1)) as peer:
            until = time.perf_counter() + 2.5
            while time.perf_counter() < until:
                peer.sendall(bytes(1 << 16))
        return 0.0
    with socket.create_server((address(0), PORT + 1)) as server:
        dist.barrier()
        peer, _ = server.accept()
        with peer:
            opened, marks = time.perf_counter(), []
            while count := len(peer.recv(1 << 20)):
                if (now := time.perf_counter()) > opened + 0.5:
                    marks.append((now, count))
    return 8 * sum(count for _, count in marks[1:]) / (marks[-1][0] - marks[0][0])


def serve(rank: int) -> None:
    """Do what comes on standard input, a line each, and answer with lines on standard output."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{address(0)}:{PORT}", rank=rank, world_size=2)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(raw_rate() if order == "rate" else measure(order)), flush=True)


# What the parent does.


def address(rank: int) -> str:
    """Return the address of a worker in its namespace."""
    return f"10.77.0.{rank + 1}"


class Network:
    """Two network namespaces, with a pair of interfaces between them."""

    def __init__(self) -> None:
        self.names = [f"rt{os.getpid()}{side}" for side in "ab"]

    def __enter__(self) -> "Network":
        for name in self.names:
            _ip("netns", "add", name)
        one, other = self.names
        _ip("link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", other)
        for rank, name in enumerate(self.names):
            _ip("-n", name, "addr", "add", f"{address(rank)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "route", "add", "default", "dev", "eth0")  # by which Ray finds the address of its node
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            _ip("netns", "del", name)

    def limit(self, megabits: int) -> None:
        """Slow both directions down; one large packet may pass at once, and a queue waits 50 ms at most."""
        for name in self.names:
            shape = ["root", "tbf", "rate", f"{megabits}mbit", "burst", "128kb", "latency", "50ms"]
            subprocess.run(["tc", "-n", name, "qdisc", "replace", "dev", "eth0", *shape], check=True)

    def start(self, rank: int, words: list[str], **more: Any) -> subprocess.Popen[str]:
        """Start a process of a worker on its core."""
        within = ["ip", "netns", "exec", self.names[rank], "taskset", "-c", str(rank)]
        return subprocess.Popen([*within, *words], text=True, **more)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Pair:
    """The two workers."""

    def __init__(self, network: Network) -> None:
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        self._workers = [
            network.start(
                rank,
                [sys.executable, __file__, "--worker", str(rank)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(2)
        ]

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stdin.close()
        for worker in self._workers:
            worker.wait(timeout=60)

    def ask(self, order: Any) -> list[Any]:
        """Return what each worker answers to an order."""
        for worker in self._workers:
            worker.stdin.write(json.dumps(order) + "\n")
            worker.stdin.flush()
        return [json.loads(worker.stdout.readline()) for worker in self._workers]


def recipe(model: str, sync: Mapping[str, Any], data: Path, **more: Any) -> Fields:
    """Return the recipe of a run of two workers, as plain data."""
    fields = {"kind": "train", "workers": 2, "steps": ENDLESS, "log": {"loggers": []}, **MODELS[model], "sync": sync}
    fields |= {"evaluation": {"every": 0}, "checkpoint": {"every": 0}, **more}
    if model == "gpt":
        fields["task.path"] = str(data / "tinyshakespeare" / "input.txt")
    return TrainRecipe.parse(apply_overrides({}, fields)).to_dict()


def window(method: str, *, again: bool) -> Fields:
    """Return how long to measure: some exchanges to warm up, and how many at least, in how many seconds at least."""
    if method == "none":
        return {"warmup": 3, "rounds": 10, "seconds": 3.0}
    if method in ("ddp", "ddp-powersgd"):
        return {"warmup": 3, "rounds": 3, "seconds": 4.0}
    if METHODS[method]["every"] == "auto":
        return {"warmup": 2 if again else 6, "rounds": 3, "seconds": 5.0}
    return {"warmup": 1, "rounds": 2, "seconds": 4.0}


def cell(pair: Pair, model: str, method: str, options: Namespace, before: Fields | None = None) -> Fields:
    """Measure a method, and return the steps per second and the rest of the slower worker.

    Args:
        pair: the workers.
        model: of `MODELS`.
        method: of `METHODS`.
        options: of the command.
        before: what an earlier call returned, whose pace is gone on with.
    """
    order = {"method": method, "recipe": recipe(model, METHODS[method], options.data)}
    if before and before["every"]:
        order["pace"] = (int(before["every"]), int(before["delay"]))
    answers = pair.ask({**order, "window": window(method, again=before is not None)})
    slower = max(answers, key=lambda answer: answer["seconds"] / answer["steps"])
    return {**slower, "steps_per_second": slower["steps"] / slower["seconds"]}


def side_by_side(pair: Pair, model: str, options: Namespace) -> tuple[float, dict[str, Fields]]:
    """Return the steps per second without communication, and what each method came to.

    The machine is faster at one time than at another, so each measurement stands between two without communication.
    """
    alone = [cell(pair, model, "none", options)["steps_per_second"]]
    found: dict[str, list[Fields]] = {method: [] for method in METHODS if method != "none"}
    for method in ORDER:
        row = cell(pair, model, method, options, found[method][-1] if found[method] else None)
        alone.append(cell(pair, model, "none", options)["steps_per_second"])
        found[method].append({**row, "eta": row["steps_per_second"] / statistics.mean(alone[-2:])})
    return statistics.median(alone), {
        method: {
            **rows[-1],
            "etas": [round(row["eta"], 4) for row in rows],
            "eta": statistics.median(row["eta"] for row in rows),
            "steps_per_second": statistics.median(row["steps_per_second"] for row in rows),
        }
        for method, rows in found.items()
    }


def table(pair: Pair, network: Network, options: Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each rate, model and method."""
    for rate in (100, 1000) if options.quick else RATES:
        network.limit(rate)
        raw = pair.ask("rate")[0]
        for model in MODELS:
            alone, found = side_by_side(pair, model, options)
            for method, row in found.items():
                every = int(row["every"]) or METHODS[method].get("every", 1)
                least = row["exchange_cost_seconds"] / (MAX_OVERHEAD * row["step_seconds"]) if row["every"] else 0.0
                averager = 8 * row["bytes_per_step"] * every / raw  # T, in seconds, at the raw rate
                line = {
                    "mbits": rate,
                    "raw_mbits": raw / 1e6,
                    "model": model,
                    "method": method,
                    "tau": every,
                    "delay": int(row["delay"]),
                    "least_tau": math.ceil(max(least, averager * alone, 1.0)),
                    "steps_per_second": row["steps_per_second"],
                    "steps_per_second_alone": alone,
                    "eta": row["eta"],
                    "etas": row["etas"],
                    "ceiling": min(1.0, every / alone / averager),
                    "megabytes_per_step": row["bytes_per_step"] / 1e6,
                    "waited_share": row["waited_seconds"] / row["seconds"],
                }
                print(line, flush=True)
                yield line


def curves(tau: int, delay: int, options: Namespace) -> dict[str, list[tuple[int, float]]]:
    """Return (steps, held-out loss) on the way, of averaged gradients and of the default method at a fixed pace."""
    steps = 240 if options.quick else 960
    more = {"steps": steps, "evaluation": {"every": steps // 10}, "checkpoint": {"keep": 1}}
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "ddp": recipe("gpt", METHODS["ddp"], options.data, **more),
            "delayed-averaging": recipe(
                "gpt", {"name": "delayed-averaging", "every": tau, "delay": delay}, options.data, **more
            ),
        }
        train_each_with_gloo([(TrainRecipe.parse(plain), Path(folder) / name) for name, plain in runs.items()])
        logs = {name: read_jsonl(Path(folder) / name / "metrics.jsonl") for name in runs}
    return {name: [(row["step"], row["valid"]["loss"]) for row in log if "valid" in row] for name, log in logs.items()}


def steps_to(target: float, curve: list[tuple[int, float]]) -> float:
    """Return after how many steps a curve first reaches the target, on the line between two of its points."""
    before = curve[0]
    for here in curve:
        if here[1] <= target:
            share = (before[1] - target) / (before[1] - here[1]) if here != before else 1.0
            return before[0] + share * (here[0] - before[0])
        before = here
    raise ValueError(f"the loss never comes down to {target}")


def time_to_loss(pair: Pair, network: Network, found: list[dict[str, Any]], options: Namespace) -> dict[str, float]:
    """Return how much sooner the default method comes to a loss at 100 Mbit/s, and one such time measured."""
    here = {row["method"]: row for row in found if (row["mbits"], row["model"]) == (100, "gpt")}
    tau, delay = here["delayed-averaging"]["tau"], here["delayed-averaging"]["delay"]
    curve = curves(tau, delay, options)
    target = 1.005 * max(points[-1][1] for points in curve.values())
    steps = {name: steps_to(target, points) for name, points in curve.items()}
    seconds = {name: steps[name] / here[name]["steps_per_second"] for name in steps}
    network.limit(100)
    whole = recipe(
        "gpt",
        {"name": "delayed-averaging", "every": tau, "delay": delay},
        options.data,
        steps=curve["delayed-averaging"][-1][0],
    )
    answers = pair.ask({"method": "delayed-averaging", "recipe": whole, "until": round(steps["delayed-averaging"])})
    return {
        "time_to_loss_speedup_100mbit": seconds["ddp"] / seconds["delayed-averaging"],
        "target_loss": target,
        "steps_to_loss_ddp": steps["ddp"],
        "steps_to_loss_delayed_averaging": steps["delayed-averaging"],
        "seconds_to_loss_ddp": seconds["ddp"],
        "seconds_to_loss_delayed_averaging": seconds["delayed-averaging"],
        "seconds_to_loss_delayed_averaging_end_to_end": max(answer["seconds"] for answer in answers),
        "loss_end_to_end": answers[0]["loss"],
    }


def with_ray_train(network: Network, options: Namespace) -> dict[str, float]:
    """Train on a Ray cluster of one node in each namespace, at 100 Mbit/s, through the command."""
    network.limit(100)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "RAY_ADDRESS": f"{address(0)}:{PORT + 2}"}
    ray = str(Path(sys.executable).parent / "ray")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rt")))
        common = ["--num-cpus=1", "--block", "--object-store-memory=200000000", "--disable-usage-stats"]
        head = ["--head", f"--port={PORT + 2}", "--include-dashboard=false", f"--temp-dir={folder / 'ray'}"]
        for rank, words in enumerate([head, [f"--address={address(0)}:{PORT + 2}"]]):
            node = [ray, "start", f"--node-ip-address={address(rank)}", *words, *common]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            stack.callback(_end, network.start(rank, node, env=environment, **quiet))
            time.sleep(10)
        words = [
            sys.executable,
            "-m",
            "raytrain",
            "train",
            "shakespeare-delayed",
            "--address",
            f"{address(0)}:{PORT + 2}",
        ]
        more = ["workers=2", "steps=400", "resources.placement=STRICT_SPREAD", "resources.cpus=1", "log.loggers=[]"]
        more += [f"task.path={options.data / 'tinyshakespeare' / 'input.txt'}", "sync.every=auto", "evaluation.every=0"]
        command = network.start(0, [*words, *more, "--out", str(folder / "run")], env=environment, cwd=folder)
        if command.wait(timeout=400):
            raise RuntimeError("the run on Ray failed")
        result = json.loads((folder / "run" / "result.json").read_text())
    return {
        "ray_train_steps_per_second": result["figures"]["steps"] / result["seconds"],
        "ray_train_overlap_ratio": result["figures"]["overlap_ratio"],
    }


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait(timeout=60)


def plot(found: list[dict[str, Any]], file: Path) -> None:
    """Draw eta over the rate for each model, with the ceiling of the default method."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, len(MODELS), figsize=(11.5, 4.2), sharey=True)
    titles = {"gpt": "GPT of 0.8M parameters", "mlp": "MLP of 1.1M parameters"}
    for place, model in zip(places, MODELS, strict=True):
        mine = [row for row in found if row["model"] == model]
        rates = sorted({row["mbits"] for row in mine})
        for method in METHODS:
            if method != "none":
                etas = [row["eta"] for rate in rates for row in mine if (row["mbits"], row["method"]) == (rate, method)]
                place.plot(rates, etas, marker="o", linewidth=3 if method == "delayed-averaging" else 1.2, label=method)
        top = [
            row["ceiling"]
            for rate in rates
            for row in mine
            if (row["mbits"], row["method"]) == (rate, "delayed-averaging")
        ]
        place.plot(rates, top, color="black", linestyle=":", label="ceiling of delayed-averaging")
        place.set(xscale="log", xlabel="Mbit/s between the workers", title=titles[model], ylim=(0, 1.12))
        place.set_xticks(rates, [str(rate) for rate in rates])
        place.grid(alpha=0.3)
    places[0].set_ylabel("steps per second over those without communication")
    figure.legend(*places[0].get_legend_handles_labels(), fontsize=8, loc="center right")
    figure.tight_layout(rect=(0, 0, 0.82, 1))
    figure.savefig(file)


def summary(found: list[dict[str, Any]], raw: Mapping[str, float]) -> dict[str, float]:
    """Return the headline."""
    ours = [row for row in found if row["method"] == "delayed-averaging"]
    at_100 = {row["method"]: row for row in found if (row["mbits"], row["model"]) == (100, "gpt")}
    return {
        "min_eta_over_ceiling": min(row["eta"] / row["ceiling"] for row in ours),
        "eta_async_100mbit": at_100["delayed-averaging"]["eta"],
        "eta_ddp_100mbit": at_100["ddp"]["eta"],
        "tau_over_minimum": max(row["tau"] / row["least_tau"] for row in ours),
        **raw,
    }


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--worker", type=int, help="be a worker: the benchmark starts these itself")
    options = parse(parser)
    options.data = options.data.absolute()
    if options.worker is not None:
        serve(options.worker)
        return
    if os.geteuid() or not sys.platform.startswith("linux"):
        raise SystemExit("skipped: network namespaces take root on Linux")
    with Network() as network:
        with Pair(network) as pair:
            found = list(table(pair, network, options))
            more = time_to_loss(pair, network, found, options)
        more |= with_ray_train(network, options)
    finish("bandwidth", found, summary(found, more), options)
    plot(found, options.json.with_suffix(".svg") if options.json else RESULTS / "bandwidth.svg")


if __name__ == "__main__":
    main()
