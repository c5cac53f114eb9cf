"""What a simulated client costs beside its own work: on `RayGrid`, and on Flower's own simulation.

    python tests/benchmark/federated_scale.py

One `ServerApp` and one `ClientApp` run on both: 16 kB go to each client, all the same, and 1.2 kB come back. Each row
is measured in processes of its own, in turns, on two actors of one processor each, from the second round on: wall, and
the processor time of the driver and of the actors, which other work on the machine does not change much. The last rows
have many clients of which 1,000 take part in a round; the others are idle.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import psutil
from bench import arguments, finish
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

DOWN_BYTES, UP_BYTES = 16_384, 1_200
ACTORS = 2
SCALES = [100, 200, 1_000, 2_000, 10_000, 20_000, 100_000]
IDLE = [1_000, 10_000, 100_000, 1_000_000]
QUICK_SCALES, QUICK_IDLE = [200, 2_000, 20_000], [1_000, 1_000_000]
ASKED = 1_000
CLIENTS_A_ROW = 60_000  # served by RayGrid, so that a row takes seconds

Figures = dict[str, float]


def load_clients() -> ClientApp:
    """Return clients that only answer."""
    app, up = ClientApp(), RecordDict({"up": ConfigRecord({"bytes": bytes(UP_BYTES)})})

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if len(message.content["down"]["bytes"]) != DOWN_BYTES:
            raise ValueError("the message is not whole")
        return Message(up, reply_to=message)

    return app


def server(clients: int, asked: int, rounds: int, report: Callable[[Sequence[Figures]], None]) -> ServerApp:
    """Return a server that reports what each round but the first one took."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        while len(nodes := grid.get_node_ids()) < clients:
            time.sleep(0.1)
        nodes = nodes if isinstance(nodes, range) else list(nodes)
        round_of(grid, random.sample(nodes, asked), [])
        actors = actors_of(psutil.Process())
        report([round_of(grid, random.sample(nodes, asked), actors) for _ in range(rounds)])

    return app


def round_of(grid: Grid, nodes: Iterable[int], actors: Sequence[psutil.Process]) -> Figures:
    """Ask clients, and return what it took."""
    actors_before = processor_seconds(actors)
    before, began = time.process_time(), time.perf_counter()
    content = RecordDict({"down": ConfigRecord({"bytes": bytes(DOWN_BYTES)})})
    sent = [Message(content, dst_node_id=node, message_type="train") for node in nodes]
    replies = list(grid.send_and_receive(sent))
    seconds, driver = time.perf_counter() - began, time.process_time() - before
    if len(replies) != len(sent) or any(len(reply.content["up"]["bytes"]) != UP_BYTES for reply in replies):
        raise RuntimeError("a reply is not whole")
    resident = sum(process.memory_info().rss for process in [psutil.Process(), *actors])
    return {
        "seconds": seconds,
        "driver": driver,
        "actors": processor_seconds(actors) - actors_before,
        "bytes": resident,
    }


def actors_of(driver: psutil.Process) -> list[psutil.Process]:
    """Return the processes of a driver's actors."""
    return [child for child in driver.children(recursive=True) if "Actor" in "".join(child.cmdline()[:1])]


def processor_seconds(processes: Iterable[psutil.Process]) -> float:
    """Return the processor time of processes until now."""
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def measure(engine: str, clients: int, asked: int, rounds: int) -> None:
    """Print the figures of rounds, as a line of JSON."""
    app = server(clients, asked, rounds, lambda figures: print(json.dumps(figures), flush=True))
    if engine == "Flower":
        from flwr.simulation import run_simulation

        resources = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": ACTORS}}
        try:
            run_simulation(app, load_clients(), clients, backend_config=resources)
        except RuntimeError:
            traceback.print_exc()
            os._exit(1)  # past the thread of the server, which waits for clients for ever
        return
    from federated.launch.actor_pool import ActorOptions
    from federated.launch.app import serve
    from federated.launch.ray_grid import RayGrid
    from raytrain.launch.session import cluster_session

    with cluster_session(None, ACTORS), RayGrid(load_clients, clients, ActorOptions(ACTORS)) as grid:
        serve(app, grid, {}, seed=0)


def figures_of(engine: str, clients: int, asked: int, rounds: int) -> list[Figures]:
    """Return the figures of rounds in processes of their own."""
    words = [sys.executable, __file__, "--measure", engine, *map(str, (clients, asked, rounds))]
    # Without an address Flower would join any Ray cluster that somebody has started on this machine.
    environment = {**os.environ, **({"RAY_ADDRESS": "local"} if engine == "Flower" else {})}
    ended = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("[{")]
    if not lines:
        raise RuntimeError(f"{engine}, {clients} clients: {ended.stderr}")
    found: list[Figures] = json.loads(lines[-1])
    return found


def row_of(engine: str, clients: int, asked: int, figures: Sequence[Figures]) -> dict[str, Any]:
    """Return a row of the table."""
    micro = 1e6 / asked
    driver, each = (micro * statistics.mean(round_[key] for round_ in figures) for key in ("driver", "actors"))
    return {
        "engine": engine,
        "clients": clients,
        "asked": asked,
        "rounds": len(figures),
        "round_seconds": statistics.median(round_["seconds"] for round_ in figures),
        "wall_us_per_client": micro * statistics.median(round_["seconds"] for round_ in figures),
        "cpu_us_per_client": driver + each,
        "driver_cpu_us": driver,
        "actors_cpu_us": each,
        "gib": max(round_["bytes"] for round_ in figures) / 2**30,
    }


def plan(quick: bool) -> list[tuple[str, int, int, int]]:
    """Return (engine, clients, asked, rounds) of what is measured in a turn."""
    share = 4 if quick else 1
    scales, idle = (QUICK_SCALES, QUICK_IDLE) if quick else (SCALES, IDLE)
    ours = [("RayGrid", count, count, max(2, CLIENTS_A_ROW // share // count)) for count in scales]
    others = [("RayGrid", count, ASKED, CLIENTS_A_ROW // share // ASKED) for count in idle]
    flower = [("Flower", 200, 200, 5), ("Flower", 2_000, 2_000, 1)]
    return [*ours, *flower, *(each for each in others if each[:3] not in [known[:3] for known in ours])]


def headline_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures that are wanted."""
    found = {(row["engine"], row["clients"], row["asked"]): row for row in rows}
    flower, ours = found["Flower", 2_000, 2_000], found["RayGrid", 2_000, 2_000]
    million, thousand = found["RayGrid", 1_000_000, ASKED], found["RayGrid", 1_000, ASKED]
    return {
        "ratio": flower["wall_us_per_client"] / ours["wall_us_per_client"],
        "cpu_ratio": flower["cpu_us_per_client"] / ours["cpu_us_per_client"],
        "cpu_us_per_client": found["RayGrid", 20_000, 20_000]["cpu_us_per_client"],
        "gib_at_million_clients": million["gib"],
        "round_time_million_over_thousand": million["round_seconds"] / thousand["round_seconds"],
    }


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__.partition("\n")[0])
    measured: dict[tuple[str, int, int], list[Figures]] = {}
    for _ in range(1 if options.quick else 3):
        for engine, clients, asked, rounds in plan(options.quick):
            figures = measured.setdefault((engine, clients, asked), [])
            figures += figures_of(engine, clients, asked, rounds)
            print(row_of(engine, clients, asked, figures), flush=True)
    rows = [row_of(*key, figures) for key, figures in measured.items()]
    finish("federated_scale", rows, headline_of(rows), options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main()
