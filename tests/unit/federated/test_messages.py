"""Payloads in Flower's messages, and the clients of a deployment: what comes from outside is data."""

import io
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.build import Federation
from federated.channel import NoReport
from federated.encodings import PayloadError
from federated.flower import client_app
from federated.flower.channel import GridChannel, GridMessenger
from federated.flower.client import TrainingClient
from federated.flower.deployed import WHO, introduced, introduction, recipe_of
from federated.flower.envelope import stamp
from federated.flower.identity import FIRST_NODE, assume_identity
from federated.flower.messages import bytes_of, content_of, shipped_bytes
from federated.flower.strategy_run import StrategyRun, checked_reply, load_gradient_clients
from federated.flower.testing import InProcessGrid
from federated.options import ReportLimits
from federated.preview import ENVELOPE_DOWN_BYTES, ENVELOPE_UP_BYTES, federated_preview, traffic_rows
from federated.recipe import FederateRecipe
from raytrain.errors import RecipeError
from raytrain.seeds.seed_model import SeedModel

RECIPE = """
kind = "federate"
task = "raytrain.testing:tiny"
rounds = 4

[clients]
count = 3
per_round = 2

[protocol]
pool = 64
local_steps = 6
"""


@given(st.binary(max_size=300))
def test_bytes_come_back_out_of_a_message(data: bytes) -> None:
    assert bytes_of(content_of(data)) == data


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"p": MetricRecord({"p": 1.0})}),
        RecordDict({"p": ConfigRecord({"p": "text"})}),
        RecordDict({"p": ConfigRecord({"p": b"", "q": b""})}),
        RecordDict({"p": ConfigRecord({"p": b""}), "q": ConfigRecord()}),
        RecordDict({"p\x1b[2J": ConfigRecord({"p": b""})}),
    ],
    ids=range(6),
)
def test_a_message_with_something_else_is_refused(content: RecordDict) -> None:
    with pytest.raises(PayloadError, match=r"^expected one record 'p' with bytes; got records \["):
        bytes_of(content)
    with pytest.raises(PayloadError, match=r"^expected a client's number"):
        introduced(content)


@given(down=st.integers(0, 20_000), up=st.integers(0, 2_000))
def test_envelopes_are_what_is_shipped_beside_the_bytes(down: int, up: int) -> None:
    assume_identity(run_id=2**63, task_id=2**63)  # ids are numbers of 64 bits, whose length counts
    message = Message(content_of(bytes(down)), dst_node_id=2**63, message_type="train", group_id="65535")
    stamp(message, message.object_id)  # as a deployment does: a reply names the message that it answers
    reply = Message(content_of(bytes(up)), reply_to=message)
    assert abs(shipped_bytes(message) - down - ENVELOPE_DOWN_BYTES) <= 16
    assert abs(shipped_bytes(reply) - up - ENVELOPE_UP_BYTES) <= 16


def test_check_shows_the_bytes_of_real_payloads(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    recipe = recipe_of({"recipe": str(tmp_path / "recipe.toml"), "set": "clients.count=2 protocol.pool=2000"})
    federation = Federation.of(recipe)
    server = federation.server()
    federation.simulation(server).play_round()
    client = server.sample().clients[0]
    payload = server.ask(client)
    report = federation.trainer()
    report.start_from(server.model)
    _, row = traffic_rows(recipe, clients=2)
    down, up = len(payload), len(report.answer(client, payload))
    assert row[1:3] == [f"{down:,}", f"{up:,}"]
    shipped = ENVELOPE_DOWN_BYTES + down + ENVELOPE_UP_BYTES + up
    assert row[3].endswith(f" = {shipped:,}")
    lines = federated_preview(recipe)
    assert lines[0].startswith("recipe: 2 clients (iid; ")
    assert any(line.startswith("FedAvg of the same parameters sends ") for line in lines)


class Answers:
    """A grid whose clients answer as a test says."""

    def __init__(self, answers: dict[int, list[RecordDict | Error]]) -> None:
        self.answers, self.asked = answers, list[list[int]]()

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        self.asked.append([message.metadata.dst_node_id for message in messages])
        replies = []
        for message in messages:
            left = self.answers[message.metadata.dst_node_id]
            if left:
                answer = left.pop(0)
                reply = Message(content_of(b""), reply_to=message)
                reply.__dict__["_content"] = answer if isinstance(answer, RecordDict) else None
                reply.__dict__["_error"] = answer if isinstance(answer, Error) else None
                replies.append(reply)
        return replies


def test_who_does_not_answer_as_expected_has_no_report_and_a_reason() -> None:
    assume_identity(run_id=1)
    crashed = Error(ErrorCode.CLIENT_APP_CRASHED, "client 0: its actor died")
    grid = Answers(
        {
            10: [crashed, content_of(b"a")],
            11: [crashed] * 9,
            12: [Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "boom\x1b[2J" + "x" * 400)],
            13: [RecordDict()],
            14: [],
            15: [content_of(b"f")],
        }
    )
    channel = GridChannel(GridMessenger(grid, range(10, 16), timeout_seconds=7))
    found = dict(channel.ask(3, dict.fromkeys(range(6), b"payload")))
    assert found.pop(0) == b"a", "it was asked again, for another client may have ended the process"
    assert found.pop(5) == b"f"
    assert found.pop(1) == NoReport("client 0: its actor died")
    reason = found.pop(2).reason
    assert (reason[:7], len(reason)) == ("boom[2J", 300)
    assert found == {
        3: NoReport("expected one record 'p' with bytes; got records []"),
        4: NoReport("no answer within 7 s"),
    }
    assert grid.asked == [[*range(10, 16)], [10, 11], [11]]


def context_of(folder: Path, client: int, changes: str = "") -> Context:
    config = {"partition-id": client, "recipe": str(folder / "recipe.toml"), "set": changes}
    return Context(1, 7, config, RecordDict(), {"recipe": "nothing that the wire says"})


def call(kind: str, content: RecordDict, context: Context) -> RecordDict:
    assume_identity(run_id=1)
    message = Message(content, dst_node_id=7, message_type=kind)
    return client_app.app(message, context).content


def test_a_client_of_a_deployment_remembers_its_model_in_its_context(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    federation = Federation.of(recipe_of({"recipe": str(tmp_path / "recipe.toml")}))
    server, contexts = federation.server(), [context_of(tmp_path, client) for client in range(3)]
    for client, context in enumerate(contexts):
        assert introduced(call("query.who", RecordDict(), context)) == (client, server.model.origin)
    for _ in range(4):
        for client in server.sample().clients:
            report = bytes_of(call("train", content_of(server.ask(client)), contexts[client]))
            assert server.hear(client, report) == "heard", "and not lost, although each message has a new trainer"
        server.aggregate()
    straight = federation.server()
    simulation = federation.simulation(straight)
    for _ in range(4):
        simulation.play_round()
    assert server.model.digest == straight.model.digest


def test_a_client_with_another_recipe_has_another_origin(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    server = Federation.of(recipe_of({"recipe": str(tmp_path / "recipe.toml")})).server()
    said = introduced(call("query.who", RecordDict(), context_of(tmp_path, 1, "seed=1")))
    with pytest.raises(RecipeError, match=r"^client 1: expected first weights, directions and options with digest"):
        server.check_origin(*said)
    eps = introduced(call("query.who", RecordDict(), context_of(tmp_path, 1, "zo.eps=0.5")))
    with pytest.raises(RecipeError, match=r"^client 1: expected first weights"):
        server.check_origin(*eps)
    own_data = introduced(call("query.who", RecordDict(), context_of(tmp_path, 1, "partition.sizes=zipf")))
    server.check_origin(*own_data)


@pytest.mark.parametrize("changes", ["seed=1", "protocol.batch=3", "optimizer.lr=0.5"])
def test_a_client_with_gradients_and_another_base_is_left_out(tmp_path: Path, changes: str) -> None:
    gradients = (
        RECIPE.replace("pool = 64", 'name = "flower"')
        + """
[strategy]
name = "FedAvg"

[optimizer]
name = "sgd"

[freeze]
match = ["*weight"]
"""
    )
    (tmp_path / "recipe.toml").write_text(gradients)
    run = StrategyRun(recipe_of({"recipe": str(tmp_path / "recipe.toml")}))
    run.check_origin(*introduced(call("query.who", RecordDict(), context_of(tmp_path, 1))))
    with pytest.raises(RecipeError, match=r"^client 1: expected first weights, directions and options with digest"):
        run.check_origin(*introduced(call("query.who", RecordDict(), context_of(tmp_path, 1, changes))))


@pytest.mark.parametrize(
    "said", [{"client": -1, "origin": "a"}, {"client": "1", "origin": "a"}, {"client": 1, "origin": b"a"}, {}]
)
def test_who_does_not_say_who_it_is_is_left_out(said: dict[str, Any]) -> None:
    with pytest.raises(PayloadError):
        introduced(RecordDict({WHO: ConfigRecord(said)}))
    assert introduced(introduction(3, "abc")) == (3, "abc")


def written(data: Any) -> Array:
    """An array that says it has three numbers, around other data."""
    file = io.BytesIO()
    np.save(file, data, allow_pickle=True)
    return Array(dtype="float32", shape=(3,), stype="numpy.ndarray", data=file.getvalue())


SENT = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}


def raw(data: bytes) -> Array:
    """Return an array of bytes that no client of ours would send."""
    return Array(dtype="float32", shape=(3,), stype="numpy.ndarray", data=data)


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, np.zeros(3, np.float32))
    return file.getvalue()


def head_of(shape: tuple[int, ...]) -> bytes:
    """Return an array's head in NumPy's format, without numbers."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


def reply(arrays: dict[str, Any], examples: Any = 5, loss: Any = 0.5, **more: float) -> RecordDict:
    metrics = {"train_loss": loss, **more} | ({} if examples is None else {"num-examples": examples})
    records = ArrayRecord({name: value if isinstance(value, Array) else Array(value) for name, value in arrays.items()})
    return RecordDict({"arrays": records, "metrics": MetricRecord(metrics)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (reply({"w": SENT["w"]}), "expected arrays w, b and metrics; got ['arrays', 'metrics']"),
        (reply(dict(reversed(SENT.items()))), "expected arrays w, b and metrics; got ['arrays', 'metrics']"),
        (RecordDict(), "expected arrays w, b and metrics; got []"),
        (reply(SENT, 10**9), "expected 1 to 50 examples; got 1000000000"),
        (reply(SENT, 0), "expected 1 to 50 examples; got 0"),
        (reply(SENT, 2.5), "expected 1 to 50 examples; got 2.5"),
        (reply(SENT, None), "expected 1 to 50 examples; got None"),
        (reply({**SENT, "b": np.zeros(4, np.float32)}), "b: expected float32 of shape (3,); got float32 of shape (4,)"),
        (reply({**SENT, "b": np.zeros(3, np.float64)}), "b: expected float32 of shape (3,); got float64 of shape (3,)"),
        (reply({**SENT, "b": np.zeros(10**6, np.float32)}), "b: expected at most 4108 bytes; got 4000128"),
        (
            reply({**SENT, "b": written(np.array([{1: 2}] * 3))}),
            "b: expected float32 of shape (3,); got object of shape (3,)",
        ),
        (reply({**SENT, "b": raw(npz())}), "b: expected an array in NumPy's format; got something else"),
        (reply({**SENT, "b": raw(b"PK\3\4 junk")}), "b: expected an array in NumPy's format; got something else"),
        (reply({**SENT, "b": raw(b"")}), "b: expected an array in NumPy's format; got something else"),
        (
            reply({**SENT, "b": raw(head_of((10**13,)))}),
            "b: expected float32 of shape (3,); got float32 of shape (10000000000000,)",
        ),
        (reply({**SENT, "b": raw(head_of((3,)))}), "b: expected an array; got ValueError"),
        (reply({**SENT, "b": np.full(3, 3e38, np.float32)}), "b: expected numbers up to 1e+06; got 3e+38"),
        (reply(SENT, loss=math.nan), "expected a finite loss; got nan"),
        (reply(SENT, loss=[1.0, 2.0]), "expected a finite loss; got [1.0, 2.0]"),
        (reply(SENT, [1.0] * 10**5), f"expected 1 to 50 examples; got {[1.0] * 10**5}"[:300]),
        (reply({**SENT, "b": written(np.zeros(5))}), "b: expected float32 of shape (3,); got float64 of shape (5,)"),
        (reply({**SENT, "b": np.full(3, np.nan, np.float32)}), "b: expected finite numbers; got some that are not"),
    ],
    ids=range(22),
)
def test_parameters_that_cannot_be_averaged_are_refused(content: RecordDict, message: str) -> None:
    with pytest.raises(PayloadError) as caught:
        checked_reply(content, SENT, ReportLimits(examples=50))
    assert str(caught.value) == message


def test_a_strategy_sees_nothing_of_a_reply_but_what_was_checked() -> None:
    content = reply(SENT, 50, more=1.0)
    content["another"] = MetricRecord({"num-examples": 10**9})
    examples, checked = checked_reply(content, SENT, ReportLimits(examples=50))
    assert examples == 50
    assert sorted(checked) == ["arrays", "metrics"]
    assert dict(checked.metric_records["metrics"]) == {"num-examples": 50, "train_loss": 0.5}
    assert {name: array.numpy().tolist() for name, array in checked.array_records["arrays"].items()} == {
        name: value.tolist() for name, value in SENT.items()
    }


@settings(max_examples=200)
@given(data=st.data())
def test_whatever_stands_for_an_array_is_equal_or_refused(data: st.DataObject) -> None:
    content = reply(SENT)
    whole = content.array_records["arrays"]["b"].data
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = data.draw(
        st.sampled_from([whole[:place], whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]])
    )
    try:
        _, checked = checked_reply(reply({**SENT, "b": raw(changed)}), SENT, ReportLimits())
    except PayloadError:
        return
    value = checked.array_records["arrays"]["b"].numpy()
    assert (value.shape, value.dtype) == ((3,), np.float32)
    assert np.isfinite(value).all()


def test_a_recipe_of_a_deployment_is_the_machine_s_own() -> None:
    assert recipe_of({"recipe": "digits-fedkseed", "set": "rounds=3 seed=2"}).rounds == 3
    assert isinstance(recipe_of({"recipe": "digits-fedavg"}), FederateRecipe)
    with pytest.raises(RecipeError, match="neither a file"):
        recipe_of({"recipe": "digits-fedseed"})


class Unpickled:
    """Notes what is unpickled in this process, while it listens."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.listens = False
        sys.addaudithook(self._hear)  # for good

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.listens and event == "pickle.find_class":
            self.found.append(arguments)


def test_no_message_file_or_state_is_unpickled(tmp_path: Path) -> None:
    unpickled, nodes = Unpickled(), range(FIRST_NODE, FIRST_NODE + 3)
    averaged = {"protocol": {"name": "flower", "local_steps": 2}, "strategy.name": "FedAvg", "optimizer.name": "sgd"}
    (tmp_path / "recipe.toml").write_text(RECIPE)
    seeded = recipe_of({"recipe": str(tmp_path / "recipe.toml")})
    recipe = seeded.with_overrides(averaged)
    assume_identity(run_id=1)
    unpickled.listens = True
    federation = Federation.of(seeded)
    grid = InProcessGrid(TrainingClient(federation.trainer()))
    server = federation.server()
    rounds = federation.rounds(server, GridChannel(GridMessenger(grid, nodes)))
    assert [len(done.heard) for done in rounds.run(tmp_path / "seeds")] == [2] * 4
    federation.seed_model(server).save(tmp_path / "seeds.safetensors")
    SeedModel.load(tmp_path / "seeds.safetensors")
    assert federation.server().resume(tmp_path / "seeds" / "states")
    run = StrategyRun(recipe)
    clients = InProcessGrid(load_gradient_clients(recipe.to_dict()))
    assert [len(done.heard) for done in run.play(clients, nodes, tmp_path / "averaged", lambda done: None)] == [2] * 4
    StrategyRun(recipe).resume(tmp_path / "averaged")
    assert unpickled.found == []
    pickle.loads(pickle.dumps(Path))
    unpickled.listens = False
    assert unpickled.found == [("pathlib", "Path")]
