"""Flower's apps on actors of Ray: the same results as anywhere, and clients that cannot harm each other or a round."""

import doctest
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import strategy
from flwr.supercore.run import RunNotRunningException

from federated import FedKSeed
from federated.flower.records import flatten, restore
from federated.flower.seeding import global_seed
from federated.launch.actor_pool import ActorOptions
from federated.launch.contents import Unpacker, pack_contents
from federated.launch.ray_grid import RayGrid
from raytrain.errors import RecipeError

DATA = Path(__file__).parent / "data"
CLIENTS = 9
HALF = ActorOptions(2, cpus=0.5)


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder from which this process and its actors import the apps."""
    folder = tmp_path_factory.mktemp("apps")
    for file in DATA.glob("flower_*.py"):
        shutil.copy(file, folder)
    sys.path.insert(0, str(folder))
    gc.freeze()  # some strategies collect garbage for each reply
    yield folder
    gc.unfreeze()
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def on_flowers_own(apps: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    """Flower's own simulation of some strategies, which goes on while other tests run."""
    # Without an address Ray would join any cluster that somebody has started on this machine.
    environment = {**os.environ, "PYTHONPATH": str(DATA.parents[2]), "RAY_ADDRESS": "local"}
    command = [sys.executable, str(apps / "flower_strategies.py"), str(apps / "theirs.json")]
    with (apps / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def grid(ray_cluster: None, apps: Path, on_flowers_own: Any) -> Iterator[RayGrid]:
    with RayGrid("flower_clients:client", CLIENTS, HALF, {"shots": 3}) as opened:
        yield opened
    assert opened.get_node_ids() == range(2, 11)


def ask(
    grid: RayGrid, kind: str, clients: Iterable[int] = range(CLIENTS), timeout: float | None = None, **config: Any
) -> list[Message]:
    content = RecordDict({"config": ConfigRecord(config)})
    return grid.send_and_receive(messages(grid, f"query.{kind}", clients, content), timeout=timeout)


def messages(
    grid: RayGrid, kind: str, clients: Iterable[int], content: RecordDict, ttl: float | None = None
) -> list[Message]:
    nodes = grid.get_node_ids()
    return [Message(content, dst_node_id=nodes[client], message_type=kind, ttl=ttl) for client in clients]


def answers(replies: Iterable[Message], key: str) -> list[Any]:
    return [reply.content["answer"][key] for reply in replies]


def results(grid: RayGrid) -> dict[str, Any]:
    """Return what all strategies lead to, and one that samples clients."""
    from flower_strategies import NAMES, FedAvg, add_up_by_partition, follow, np, outcome, seeds_by_partition

    with global_seed(3):
        some = outcome(FedAvg(fraction_train=0.5), ArrayRecord([np.zeros(4)]), grid)
    found = {name: follow(name, grid) for name in NAMES}
    return {**found, "by partition": add_up_by_partition(grid), "some": some, "seeds": seeds_by_partition(grid)}


@pytest.fixture(scope="module")
def ours(grid: RayGrid) -> dict[str, Any]:
    return results(grid)


STRATEGIES = [name for name in strategy.__all__ if name not in ("Result", "Strategy")]


@pytest.mark.parametrize("name", STRATEGIES)
def test_flowers_strategies_lead_to_what_they_lead_to_without_ray(name: str, ours: dict[str, Any]) -> None:
    from flower_strategies import follow, in_this_process

    assert ours[name] == follow(name, in_this_process())
    assert len(ours[name]["trained"]) == 2


def test_results_do_not_depend_on_the_number_of_actors(ours: dict[str, Any]) -> None:
    for actors in (1, 3):
        with RayGrid("flower_clients:client", CLIENTS, ActorOptions(actors, cpus=0.5)) as other:
            assert results(other) == ours, f"{actors} actors"
    assert ours["some"]["trained"][0]["partition"] != ours["FedAvg"]["trained"][0]["partition"], "it sampled"


def test_an_app_loads_once_for_each_actor(grid: RayGrid, apps: Path) -> None:
    loaded = (apps / "loaded.txt").read_text().splitlines()
    pids = set(answers(ask(grid, "who"), "pid"))
    assert [loaded.count(str(pid)) for pid in pids] == [1] * len(pids)


def test_a_million_clients_are_a_range(grid: RayGrid) -> None:
    nodes = grid.get_node_ids()
    assert isinstance(nodes, range)
    assert list(nodes) == list(range(2, 2 + CLIENTS))
    assert [each.node_id for each in grid.get_nodes()] == list(nodes)


def test_a_client_knows_its_partition_and_the_run_config(grid: RayGrid) -> None:
    expected = {"partition-id": 8, "num-partitions": 9, "shots": 4, "node": 10}
    for _ in range(2):
        (reply,) = ask(grid, "config", [8])
        assert dict(reply.content["answer"]) == expected


def test_replies_are_a_list_in_the_order_of_the_messages(grid: RayGrid, tmp_path: Path) -> None:
    seconds = [0.6] + [0.01 * (client % 3) for client in range(1, CLIENTS)]
    order = [0, 8, 3, 5, 1, 7, 2]
    replies = ask(grid, "sleep", order, folder=str(tmp_path), seconds=seconds)
    assert isinstance(replies, list)
    assert answers(replies, "partition") == order
    assert [reply.metadata.src_node_id for reply in replies] == [client + 2 for client in order]
    assert len(set(answers(replies, "pid"))) == 2


def test_a_client_cannot_change_what_the_next_one_sees(grid: RayGrid) -> None:
    import numpy as np

    arrays, config = ArrayRecord([np.zeros(2)]), ConfigRecord({"list": [1, 2], "number": 7})
    content = RecordDict({"arrays": arrays, "config": config})
    replies = grid.send_and_receive(messages(grid, "query.spoil", range(CLIENTS), content))
    assert answers(replies, "seen") == [[1, 2]] * CLIENTS
    assert answers(replies, "number") == [7] * CLIENTS
    assert answers(replies, "size") == [3] * CLIENTS
    assert dict(config) == {"list": [1, 2], "number": 7}


def test_clients_that_reuse_a_record_for_their_replies_have_their_own(grid: RayGrid) -> None:
    assert answers(ask(grid, "reuse"), "partition") == list(range(CLIENTS))


def test_the_example_in_its_docstring_runs(ray_cluster: None) -> None:
    names = {"FedKSeed": FedKSeed, "RayGrid": RayGrid, "ActorOptions": ActorOptions}
    [example] = doctest.DocTestFinder(recurse=False).find(RayGrid, "RayGrid", globs=names)
    result = doctest.DocTestRunner().run(example)
    assert (result.failed, result.attempted) == (0, 3)


def test_what_messages_share_is_in_the_object_store_once(ray_cluster: None) -> None:
    arrays = ArrayRecord([])
    one = RecordDict({"arrays": arrays, "config": ConfigRecord({"lr": 0.1})})
    other = RecordDict({"arrays": arrays, "config": ConfigRecord({"lr": 0.2})})
    packed = pack_contents([one, other, one])
    assert [packed[id(content)].records["arrays"] for content in (one, other)] == [0, 0]
    assert packed[id(one)].shared == packed[id(other)].shared
    assert packed[id(one)].records["config"] == 1
    assert packed[id(other)].records["config"] == flatten(ConfigRecord({"lr": 0.2}))
    unpacked = Unpacker().unpack(list(packed.values()))
    assert [restore(unpacked[id(packed[id(content)])]) for content in (one, other)] == [one, other]
    alone = RecordDict({"config": ConfigRecord()})
    assert pack_contents([alone])[id(alone)].shared is None, "one reader needs no object store"


def test_exceptions_of_clients_are_replies_that_name_them(grid: RayGrid) -> None:
    replies = ask(grid, "fail", range(5))
    assert [reply.has_error() for reply in replies] == [False, True, True, True, False]
    assert {reply.error.code for reply in replies[1:4]} == {ErrorCode.CLIENT_APP_RAISED_EXCEPTION}
    source = (DATA / "flower_clients.py").read_text().splitlines()
    line = next(number for number, text in enumerate(source, 1) if "no data" in text)
    assert [reply.error.reason for reply in replies[1:4]] == [
        f"client 1: ValueError: no data\nfor this client (flower_clients.py, line {line})",
        f"client 2: SystemExit: 3 (flower_clients.py, line {line + 2})",
        "client 3: TypeError: expected a Message in return; got NoneType",
    ]
    unknown = Message(RecordDict(), dst_node_id=99, message_type="query.who")
    (reply,) = grid.send_and_receive([unknown])
    assert (reply.error.code, reply.error.reason) == (ErrorCode.NODE_UNAVAILABLE, "node 99: expected one from 2 to 10")


def test_what_a_client_leaves_in_its_context_is_there_the_next_time(grid: RayGrid) -> None:
    rounds = [ask(grid, "visits", [*range(CLIENTS), 5, 0]) for _ in range(3)]
    for number, replies in enumerate(rounds):
        visits = {
            place: reply.content["answer"]["visits"] for place, reply in enumerate(replies) if not reply.has_error()
        }
        assert visits[1] == number + 1
        assert (visits[5], visits[9]) == (2 * number + 1, 2 * number + 2), "asked twice a round"
        assert visits[0] == visits[10] == 1, "it leaves nothing"
        assert (3 in visits) == (number == 0), "its failure is not remembered, so it fails again"
    kept = grid._pool.outbox._states
    assert sorted(kept) == [client + 2 for client in range(1, CLIENTS)]


def test_replies_can_be_pulled_as_they_come(grid: RayGrid, tmp_path: Path) -> None:
    config = ConfigRecord({"folder": str(tmp_path), "seconds": [1.5] + [0.0] * 8})
    ids = grid.push_messages(messages(grid, "query.sleep", range(CLIENTS), RecordDict({"config": config})))
    config["seconds"] = [0.0] * 9  # too late to count
    assert len(set(ids)) == CLIENTS
    came: list[Message] = []
    while not came:
        came += grid.pull_messages(ids)
    assert 0 not in answers(came, "partition")
    while len(came) < CLIENTS:
        came += grid.pull_messages(ids)
    assert sorted(reply.metadata.reply_to_message_id for reply in came) == sorted(ids)
    assert grid.pull_messages(ids) == []


def test_a_killed_actor_is_an_error_of_what_it_held_and_is_replaced(
    grid: RayGrid, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def kill() -> None:
        while not (tmp_path / "4").exists() or not (pid := (tmp_path / "4").read_text()):
            time.sleep(0.01)
        os.kill(int(pid), signal.SIGKILL)

    caplog.set_level("WARNING")
    ask(grid, "sleep", folder=str(tmp_path), seconds=[0.3] * CLIENTS)  # so that each actor is handed one at a time
    for note in tmp_path.iterdir():
        note.unlink()
    before = set(answers(ask(grid, "sleep", range(2), folder=str(tmp_path), seconds=[0.3] * 2), "pid"))
    killer = threading.Thread(target=kill)
    killer.start()
    replies = ask(grid, "sleep", range(2, 7), folder=str(tmp_path), seconds=[0.3] * 4 + [60.0] + [0.3] * 2)
    killer.join()
    lost = [reply for reply in replies if reply.has_error()]
    assert [reply.error.code for reply in lost] == [ErrorCode.CLIENT_APP_CRASHED]
    assert lost[0].error.reason == "client 4: its actor died: killed, out of memory, or crashed"
    assert caplog.messages == ["an actor died; starting another in its place"]
    after: set[int] = set()
    while len(after) < 2:
        after = set(answers(ask(grid, "sleep", folder=str(tmp_path), seconds=[0.1] * CLIENTS), "pid"))
    assert len(after - before) == 1


def test_a_round_ends_when_its_time_is_up(
    grid: RayGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("federated.launch.actor_pool.PATIENCE_SECONDS", 0.5)
    caplog.set_level("WARNING")
    began = time.monotonic()
    replies = ask(grid, "sleep", [6, 7, 8], timeout=2, folder=str(tmp_path), seconds=[0.0] * 6 + [60.0, 0.1, 0.2])
    assert 2 <= time.monotonic() - began < 10
    assert answers(replies, "partition") == [7, 8]
    while not caplog.messages:
        ask(grid, "who")  # of the other actor; the one that is stuck is replaced when messages have to wait
        assert time.monotonic() - began < 60
    assert caplog.messages == ["an actor died; starting another in its place"]
    assert not psutil.pid_exists(int((tmp_path / "6").read_text()))


def test_a_message_that_expires_is_an_error(grid: RayGrid, tmp_path: Path) -> None:
    config = ConfigRecord({"folder": str(tmp_path), "seconds": [1.5] * CLIENTS})
    content = RecordDict({"config": config})
    (reply,) = grid.send_and_receive(messages(grid, "query.sleep", [2], content, ttl=0.5))
    assert reply.error.code == ErrorCode.REPLY_MESSAGE_UNAVAILABLE
    assert reply.error.reason == "client 2: no reply within the message's 0.5 s"
    (late,) = grid.push_messages(messages(grid, "query.sleep", [2], content, ttl=0.5))
    replies: list[Message] = []
    while not replies:
        replies = grid.pull_messages([late])
    assert replies[0].error == reply.error
    time.sleep(1.5)
    assert grid.pull_messages([late]) == []


def test_a_stop_request_ends_all_waiting(ray_cluster: None, apps: Path, tmp_path: Path) -> None:
    import ray

    stop = threading.Event()
    free = ray.available_resources()["CPU"]
    with RayGrid("flower_clients:client", CLIENTS, ActorOptions(1, cpus=0.25), stopped=stop.is_set) as grid:
        threading.Timer(0.5, stop.set).start()
        with pytest.raises(RunNotRunningException):
            ask(grid, "sleep", folder=str(tmp_path), seconds=[60.0] * CLIENTS)
        with pytest.raises(RunNotRunningException):
            grid.pull_messages(["1"])
    assert ray.is_initialized(), "the connection is kept"
    give_up = time.monotonic() + 30
    while ray.available_resources()["CPU"] != free and time.monotonic() < give_up:
        time.sleep(0.05)
    assert ray.available_resources()["CPU"] == free


def test_wrong_input_starts_nothing(ray_cluster: None, apps: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        RayGrid("flower_clients:client", CLIENTS, ActorOptions(9))
    assert str(caught.value) == (
        "clients.actors: 9 actor(s) of 1 CPU each do not fit on 1 machine(s) with 4 CPU; set clients.actors=4"
    )
    with pytest.raises(RecipeError) as caught:
        RayGrid("flower_clients:clint", CLIENTS, ActorOptions(1, cpus=0.5))
    assert str(caught.value).startswith("client: 'flower_clients' has no 'clint'; did you mean client")
    with pytest.raises(RecipeError, match=r"^client: cannot be loaded: ZeroDivisionError: division by zero \(test_ray"):
        RayGrid(lambda: 1 / 0, CLIENTS, ActorOptions(1, cpus=0.5))


def test_flowers_own_simulation_leads_to_the_same(
    on_flowers_own: subprocess.Popen[bytes], apps: Path, ours: dict[str, Any]
) -> None:
    assert on_flowers_own.wait(600) == 0, (apps / "log.txt").read_text()[-2000:]
    theirs = json.loads((apps / "theirs.json").read_text())
    assert theirs.pop("by partition") == ours["by partition"], "to the bit"
    assert theirs.pop("seeds") == ours["seeds"], "the reports of a federated run, to the bit"
    assert len(theirs) == 4
    for name, result in theirs.items():  # which adds replies up as they come, and so rounds otherwise
        for key in ("trained", "evaluated"):
            assert [pytest.approx(record, rel=1e-12) for record in result[key]] == ours[name][key]
        for array, other in zip(result["arrays"], ours[name]["arrays"], strict=True):
            assert array == pytest.approx(other, rel=1e-12)


def test_flower_does_not_report(apps: Path) -> None:
    code = (
        "import os; [os.environ.pop(name, None) for name in ('FLWR_TELEMETRY_ENABLED', 'FLWR_DISABLE_UPDATE_CHECK')]\n"
        "import federated.launch.ray_grid\n"
        "from flwr.supercore import telemetry, update_check\n"
        "print(telemetry.FLWR_TELEMETRY_ENABLED, os.environ[update_check.FLWR_DISABLE_UPDATE_CHECK])\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout == "0 1\n"
