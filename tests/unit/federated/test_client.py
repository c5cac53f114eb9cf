"""What clients do with real models: the steps of the landed optimizers, served in any order, killed at any time."""

import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from federated.build import Federation, initial_module, protocol_of, task_of, working_model_of
from federated.encodings import ENCODINGS
from federated.recipe import FederateRecipe
from federated.round_log import replay
from federated.sampling import batches
from federated.server import Server
from federated.tables import FAULTS
from federated.wire import MODEL_BYTES, REPORT_BYTES, ReportHeader, is_lost
from federated.working_model import WorkingModel
from raytrain.errors import RecipeError
from raytrain.optim.arguments import optimizer_options
from raytrain.optim.optimizers import make_optimizer
from raytrain.optim.options import ZEROTH_ORDER
from raytrain.registry import resolve
from raytrain.seeds.seed_model import SeedModel
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.options import ScalarOptions
from raytrain.sync.scalars import ScalarExchange
from raytrain.sync.transport import LocalTransport
from raytrain.zeroth.objective import make_closure
from raytrain.zeroth.optimizers import ZerothOrderOptimizer, directions_of
from raytrain.zeroth.perturbed import PerturbedModel
from raytrain.zeroth.step import ZeroOrderStep

FIELDS: dict[str, Any] = {
    "kind": "federate",
    "task": "raytrain.testing:tiny",
    "clients": {"count": 5, "per_round": 3},
    "optimizer": {"lr": 0.02},
    "rounds": 4,
    "seed": 5,
    "protocol": {"pool": 64, "local_steps": 12, "batch": 4},
}


def recipe_of(**more: Any) -> FederateRecipe:
    return FederateRecipe.parse_with(FIELDS, more)


PROTOCOLS: list[dict[str, Any]] = [
    {"protocol.name": "fedkseed"},
    {"protocol.name": "fedkseed-pro", "protocol.up": "float16"},
    {"protocol.name": "common-seeds", "protocol.pool": 0},
    {"protocol.name": "common-seeds", "protocol.local": True, "protocol.up": "float32"},
    {"protocol.name": "sign", "protocol.local": True},
]
each_protocol = pytest.mark.parametrize("more", PROTOCOLS, ids=lambda more: "-".join(map(str, more.values())))


def parameters_of(federation: Federation) -> list[Tensor]:
    return [part.tensor.clone() for part in federation.model.directions.slices]


@each_protocol
@pytest.mark.parametrize("train_mode", [False, True])
def test_a_client_that_is_served_after_others_answers_as_one_that_is_served_first(
    more: dict[str, Any], train_mode: bool
) -> None:
    task = {"name": "raytrain.testing:tiny", "dropout": 0.5, "norm": not train_mode}
    recipe = recipe_of(**more, task=task, **{"zo.train_mode": train_mode})
    federation = Federation.of(recipe)
    server = federation.server()
    federation.simulation(server).play_round()
    payloads = {client: server.ask(client) for client in server.sample().clients}
    first = {client: federation.trainer().answer(client, payload) for client, payload in payloads.items()}
    trainer = federation.trainer()
    for client in (*payloads, *reversed(payloads), *payloads):
        assert trainer.answer(client, payloads[client]) == first[client]
    torch.manual_seed(99)
    model = working_model_of(recipe, federation.task, keep_round=False)  # it makes the round's anew for each client
    trainer = Federation(recipe, federation.task, federation.partition, model).trainer()
    for client in reversed(payloads):
        assert trainer.answer(client, payloads[client]) == first[client]
    assert len(set(first.values())) == len(first)


def test_statistics_that_nobody_sends_are_refused() -> None:
    with pytest.raises(RecipeError) as error:
        Federation.of(recipe_of(task={"name": "raytrain.testing:tiny", "norm": True}, **{"zo.train_mode": True}))
    assert str(error.value) == (
        "zo.train_mode: expected false with norm.running_mean, which clients neither keep nor send; in evaluation mode "
        "they probe the model that is evaluated"
    )


def zeroth_step_by_step(recipe: FederateRecipe, optimizer: str, seeds: list[list[int]], up: str) -> list[Tensor]:
    """Run the landed zeroth-order step on the batches of client 0, along these seeds in each step."""
    task = task_of(recipe)
    module = initial_module(recipe, task).eval()
    constructor = resolve(ZEROTH_ORDER, optimizer, "optimizer.name")
    options = optimizer_options(optimizer)(name=optimizer, lr=FIELDS["optimizer"]["lr"])
    made = make_optimizer(constructor, options, module)
    assert isinstance(made, ZerothOrderOptimizer)
    space = directions_of(module, made, distribution="rademacher", sparsity=0.0, blockwise=False)
    made.bind(space)

    class Rounded(ScalarExchange):
        """Hears each number as the server does."""

        def all_gather(self, values: Sequence[float], *_: Any, **__: Any) -> tuple[list[list[float]], list[float]]:
            return [[ENCODINGS[up].rounded(value) for value in values]], [1.0]

    sync = Rounded(ExactAverager(LocalTransport()), ScalarOptions(name="scalars"), one_byte=False)
    sync.attach(module)

    class Along(ZeroOrderStep):
        @staticmethod
        def direction_seed(seed: int, step: int, rank: int, place: int) -> int:
            return seeds[step][place]

    zeroth = Along(
        PerturbedModel(module, space),
        made,
        sync,
        len(seeds[0]),
        recipe.zo.eps,
        "central",
        False,
        "",
        10.0,
        weighted=False,
    )
    own = Federation.of(recipe).partition.indices(0)
    drawn = own[batches(recipe.seed, 0, 0, len(own), recipe.protocol.local_steps, recipe.protocol.batch)]
    for step in range(len(seeds)):
        batch = task.collate([task.data("train")[index] for index in drawn[step].tolist()])
        batch = {name: value.float() for name, value in batch.items()}
        loss = make_closure(task, module, [(batch, task.weights(batch))], (), None, "")
        zeroth.step(loss, module, 0, (step, 0), 1.0)
    return [part.tensor for part in space.slices]


ONE_CLIENT = {"clients": {"count": 1, "per_round": 1}, "rounds": 1}


@pytest.mark.parametrize(
    ("more", "optimizer"),
    [
        ({"protocol.name": "fedkseed", "protocol.up": "float32", "protocol.down": "float32"}, "zo-sgd"),
        ({"protocol.name": "fedkseed", "protocol.up": "one-byte", "protocol.down": "float32"}, "zo-sgd"),
        ({"protocol.name": "common-seeds", "protocol.local": True, "protocol.up": "one-byte"}, "zo-sgd"),
        ({"protocol.name": "sign", "protocol.local": True}, "zo-sgd-sign"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_one_client_takes_the_steps_of_the_landed_optimizer(more: dict[str, Any], optimizer: str) -> None:
    """Its path to the bit, and the server's sum of it but for the one rounding where the path had one a step."""
    recipe = recipe_of(**more, **ONE_CLIENT)
    federation = Federation.of(recipe)
    server = federation.server()
    before = parameters_of(federation)
    federation.simulation(server).play_round()
    path = parameters_of(federation)
    protocol = protocol_of(recipe)
    seeds = protocol.table.seeds(protocol.directions(0, 0)).tolist()
    wanted = zeroth_step_by_step(
        recipe, optimizer, [[seed] for seed in seeds], recipe.protocol.__dict__.get("up", "float32")
    )
    assert all(map(torch.equal, path, wanted))
    federation.model.set_to(server.model, protocol)
    for found, there, start in zip(parameters_of(federation), wanted, before, strict=True):
        torch.testing.assert_close(found - start, there - start, rtol=2e-3, atol=1e-6)
    assert any(not torch.equal(one, start) for one, start in zip(path, before, strict=True))


@pytest.mark.parametrize(
    ("more", "optimizer"),
    [
        ({"protocol.name": "common-seeds", "protocol.up": "float32", "protocol.down": "float32"}, "zo-sgd"),
        ({"protocol.name": "sign"}, "zo-sgd-sign"),
    ],
    ids=["common-seeds", "sign"],
)
def test_common_seeds_without_local_moves_are_one_step_of_many_directions(more: dict[str, Any], optimizer: str) -> None:
    """With one example, all steps of a client have the same batch, as all directions of the optimizer's step do."""
    task = {"name": "raytrain.testing:tiny", "examples": 1}
    recipe = recipe_of(**more, **ONE_CLIENT, task=task)
    federation = Federation.of(recipe)
    server = federation.server()
    before = parameters_of(federation)
    federation.simulation(server).play_round()
    assert all(map(torch.equal, parameters_of(federation), before)), "the client stays where the round starts"
    protocol = protocol_of(recipe)
    seeds = protocol.table.seeds(protocol.directions(0, 0)).tolist()
    wanted = zeroth_step_by_step(recipe, optimizer, [seeds], "float32")
    federation.model.set_to(server.model, protocol)
    for found, there, start in zip(parameters_of(federation), wanted, before, strict=True):
        torch.testing.assert_close(found - start, there - start, rtol=2e-3, atol=1e-6)


def test_a_client_moves_by_what_it_sends_and_not_by_what_it_measured() -> None:
    """Else its path would not be what the server adds up; what is not used moves nothing and is sent as that."""
    recipe = recipe_of(**ONE_CLIENT, **{"protocol.up": "one-byte", "zo.outlier_threshold": 1.0})
    federation = Federation.of(recipe)
    server = federation.server()
    before = parameters_of(federation)
    (client,) = server.sample().clients
    report = federation.trainer().answer(client, server.ask(client))
    sent = ENCODINGS["one-byte"].read(report[REPORT_BYTES:], 12)
    assert 0 < np.isnan(sent).sum() < 12, "beyond one standard deviation some are"
    protocol = protocol_of(recipe)
    seeds = protocol.table.seeds(protocol.directions(0, client)).tolist()
    space = federation.model.directions
    path = parameters_of(federation)
    for part, start in zip(space.slices, before, strict=True):
        part.tensor.copy_(start)
    for seed, number in zip(seeds, sent.tolist(), strict=True):
        if not np.isnan(number):
            space.add_direction(seed, -protocol.rate(0) * number)
    assert all(map(torch.equal, path, parameters_of(federation)))


def test_a_loss_that_is_not_finite_ends_no_round() -> None:
    for name in ("fedkseed", "sign"):
        recipe = recipe_of(task=f"{__name__}:nowhere", **{"protocol.name": name})
        federation = Federation.of(recipe)
        server = federation.server()
        going = federation.simulation(server).play_round()
        assert len(going.heard) == 3
        numbers = np.stack([report.scalars for report in going.heard.values()])
        if name == "sign":
            odd = np.array([client % 2 for client in going.heard])
            assert (numbers * np.where(odd, 1, -1)[:, None] == numbers[0] * (1 if odd[0] else -1)).all()
        else:
            assert np.isnan(numbers).all()
            assert not server.model.coefficients.any()


def test_a_direction_that_changes_nothing_is_no_vote_against() -> None:
    recipe = recipe_of(task=f"{__name__}:level", **{"protocol.name": "sign", "clients.per_round": 4})
    federation = Federation.of(recipe)
    server = federation.server()
    going = federation.simulation(server).play_round()
    for client, report in going.heard.items():
        expected = [
            1.0 if (seed ^ client) % 2 else -1.0
            for seed in federation.trainer()._protocol.table.seeds(report.directions).tolist()
        ]
        assert report.scalars.tolist() == expected


def level() -> Any:
    from raytrain.tasks.task import Task

    return Task(
        model=lambda seed: torch.nn.Linear(3, 1),
        data=lambda split: list(torch.ones(20, 3)),
        losses=lambda module, batch: module(batch)[:, 0] * 0 + 1,
    )


def nowhere() -> Any:
    from raytrain.tasks.task import Task

    return Task(
        model=lambda seed: torch.nn.Linear(3, 1),
        data=lambda split: list(torch.ones(20, 3)),
        losses=lambda module, batch: module(batch)[:, 0] * float("inf"),
    )


def test_a_lost_client_asks_for_all_of_the_model() -> None:
    federation = Federation.of(recipe_of())
    server = federation.server()
    simulation = federation.simulation(server)
    simulation.play_round()
    simulation.play_round()
    client = next(client for client in server.sample().clients if server.versions[client] == 1)
    forgetful = federation.trainer()
    payload = server.ask(client)
    answer = forgetful.answer(client, payload)
    assert is_lost(answer, ReportHeader(2, 2, 12, 1), client)
    assert server.hear(client, answer) == "lost"
    assert server.versions[client] == 0
    again = server.ask(client)
    assert again != payload
    assert server.hear(client, forgetful.answer(client, again)) == "heard"
    assert forgetful.answer(client, payload) == forgetful.answer(client, again), "it now has the model, however it came"


def test_first_weights_in_a_file_need_no_copy(tmp_path: Path) -> None:
    recipe = recipe_of()
    federation = Federation.of(recipe)
    save_file(dict(initial_module(recipe, federation.task).named_parameters()), tmp_path / "w0.safetensors")
    model = working_model_of(recipe, federation.task, load_file(tmp_path / "w0.safetensors"), keep_round=False)
    assert model.base == federation.model.base
    server, other = federation.server(), Federation(recipe, federation.task, federation.partition, model)
    for _ in range(2):
        federation.simulation(server).play_round()
    client = server.sample().clients[0]
    server.versions[:] = 0
    payload = server.ask(client)
    assert federation.trainer().answer(client, payload) == other.trainer().answer(client, payload)


@pytest.mark.parametrize("train_mode", [True, False])
def test_a_payload_that_is_no_payload_is_answered_or_refused(train_mode: bool) -> None:
    from federated.encodings import PayloadError

    federation = Federation.of(recipe_of(**{"zo.train_mode": train_mode}))
    trainer = federation.trainer()
    with pytest.raises(PayloadError, match=f"^expected at least {MODEL_BYTES} bytes; got 3$"):
        trainer.answer(1, b"abc")
    assert is_lost(trainer.answer(1, b"\3\0\0\0" + b"x" * 40), ReportHeader(3, 3, 1, 1), 1)


def played(recipe: FederateRecipe, folder: Path, hook: Callable[[str, Server], None] = lambda *_: None) -> Server:
    """Play a run to its end from what is saved, and call the hook at each transition."""
    federation = Federation.of(recipe)
    server = federation.server()
    simulation = federation.simulation(server)
    for name in ("sample", "ask", "hear", "aggregate", "save"):
        act = getattr(server, name)

        def noted(*arguments: Any, act: Any = act, name: str = name) -> Any:
            hook(f"before {name}", server)
            return act(*arguments)

        setattr(server, name, noted)
    for _ in simulation.run(folder):
        hook("after save", server)
    assert replay(folder / "reports.bin", protocol_of(recipe), federation.model.base).digest == server.model.digest
    return server


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(PROTOCOLS), st.data())
def test_a_run_that_is_killed_at_any_transition_ends_with_the_same_coefficients(
    more: dict[str, Any], data: st.DataObject
) -> None:
    import tempfile

    recipe = recipe_of(**more, **{"faults.drop": 0.2, "faults.garble": 0.2, "faults.crash": 0.1})
    with tempfile.TemporaryDirectory() as name:
        straight = played(recipe, Path(name) / "straight")
        moments: list[str] = []
        played(recipe, Path(name) / "counted", lambda moment, _: moments.append(moment))
        killed = Path(name) / "killed"
        for kill in data.draw(st.lists(st.integers(0, len(moments) - 1), min_size=1, max_size=3)):
            process = multiprocessing.get_context("fork").Process(target=play_and_die, args=(recipe, killed, kill))
            process.start()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
        resumed = played(recipe, killed)
    assert resumed.model.digest == straight.model.digest
    assert np.array_equal(resumed.versions, straight.versions)


def play_and_die(recipe: FederateRecipe, folder: Path, moment: int) -> None:
    """Play until a transition, and be killed there; one that resumes has fewer of them, and may come to the end."""
    seen = 0

    def die(_: str, __: Server) -> None:
        nonlocal seen
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    played(recipe, folder, die)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_survived_counted_and_repeated(fault: str) -> None:
    more = {f"faults.{fault}": 0.4, "faults.timeout_seconds": 30, "rounds": 6, "faults.slow_seconds": 31}
    rounds: list[list[Any]] = []
    for _ in range(2):
        federation = Federation.of(recipe_of(**more))
        server = federation.server()
        simulation = federation.simulation(server)
        rounds.append([simulation.play_round() for _ in range(6)])
    for one, other in zip(*rounds, strict=True):
        assert (one.missing, one.refusals, sorted(one.heard)) == (other.missing, other.refusals, sorted(other.heard))
        assert len(one.missing) + one.refused + len(one.heard) == 3
    reasons = {reason for one in rounds[0] for reason in one.missing.values()}
    refused = sum(one.refused for one in rounds[0])
    assert 2 <= 18 - sum(len(one.heard) for one in rounds[0]) <= 14
    expected = {"drop": {"no answer"}, "slow": {"late by 31 s"}, "crash": {"its process was lost"}, "garble": set()}
    assert reasons == expected[fault]
    assert (refused > 0) == (fault == "garble")


@each_protocol
def test_the_result_is_a_seed_model_of_the_same_weights(more: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(**more, **{"protocol.weight_decay": 1.0})
    federation = Federation.of(recipe)
    initial = federation.model.directions.with_tensors(
        {part.name: part.tensor.clone() for part in federation.model.directions.slices}
    )
    server = federation.server()
    for _ in range(2):
        federation.simulation(server).play_round()
    federation.model.seed_model(server.model, server.protocol).save(tmp_path / "seeds.safetensors")
    federation.model.set_to(server.model, protocol_of(recipe))
    weights = SeedModel.load(tmp_path / "seeds.safetensors").weights(initial)
    assert all(map(torch.equal, weights, parameters_of(federation)))


UNPICKLED: list[object] = []
sys.addaudithook(lambda event, arguments: UNPICKLED.append(arguments) if event == "pickle.find_class" else None)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Path("a")))
    assert UNPICKLED, "the hook sees it"
    UNPICKLED.clear()
    for _ in range(2):
        played(recipe_of(), tmp_path)
    assert not UNPICKLED


def test_what_stands_still_beside_the_directions_is_known_by_the_digest_too() -> None:
    recipe = recipe_of()
    federation = Federation.of(recipe)
    for name in ("frozen.weight", "version"):
        module = initial_module(recipe, federation.task)
        module.state_dict()[name].view(-1)[0] += 1
        space = federation.model.directions.with_tensors(dict(module.named_parameters()))
        other = WorkingModel(module, space)
        assert other.base != federation.model.base
        assert other.seed_model(federation.server().model, protocol_of(recipe)).base == space.digest()
    again = working_model_of(recipe, federation.task)
    assert again.base == federation.model.base
