"""Every entry of every name table against the interface it is there for."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from raytrain.evaluation import measure
from raytrain.kinds import load_kinds
from raytrain.names import resolve
from raytrain.recipe import declared_options, read_toml
from raytrain.sync.exchange import ExactExchange
from raytrain.sync.synchroniser import SYNCHRONISERS
from raytrain.task import TASKS, Task, make_task, options_of_task
from raytrain.tensors import weights_of
from raytrain.testing import ThreadGroup, ThreadTransport, TinyModel, TinyOptions

SMALL = {"text": {"layers": 1, "heads": 2, "width": 16, "block": 32}}


def entries() -> Iterator[Any]:
    for kind in load_kinds().values():
        for title, table in kind.tables.items():
            for name in table:
                yield pytest.param(table, name, id=f"{title}-{name}")


@pytest.mark.parametrize(("table", "name"), list(entries()))
def test_every_name_stands_for_something_described(table: Mapping[str, str], name: str) -> None:
    assert (resolve(table, name, "name").__doc__ or "").strip()


@pytest.mark.parametrize("name", list(load_kinds()))
def test_every_kind_can_run_and_evaluate(name: str) -> None:
    kind = load_kinds()[name]
    assert callable(resolve({}, kind.evaluate, "kind"))
    for file in kind.recipes.glob("*.toml"):
        raw, _ = read_toml(str(file), [])
        recipe = kind.recipe.parse(raw)
        assert recipe.name == file.stem
        assert file.read_text().startswith("# "), "`raytrain list` prints a recipe's first comment"


def made(name: str) -> Task:
    factory = resolve(TASKS, name, "task.name")
    return make_task(factory, options_of_task(factory)(name=name, **SMALL.get(name, {})))


@pytest.mark.parametrize("name", TASKS)
def test_tasks(name: str) -> None:
    task = made(name)
    one, same, other = task.model(0), task.model(0), task.model(1)
    assert all(map(torch.equal, one.parameters(), same.parameters()))
    assert not all(map(torch.equal, one.parameters(), other.parameters()))
    for split in ("train", "valid"):
        examples = task.data(split)
        assert len(examples) > 0
        assert isinstance(examples.domain(0), str)
        assert isinstance(examples.label(len(examples) - 1), int)
        batch = task.collate([examples[place] for place in range(3)])
        losses, weights = task.losses(one, batch), weights_of(task, batch, 3, torch.device("cpu"))
        assert losses.shape == weights.shape
        assert losses.dtype == torch.float32
        assert (weights >= 0).all()
        losses.sum().backward()
        assert all(parameter.grad is not None for parameter in one.parameters())
    with torch.no_grad():
        measured = measure(task, one.eval(), batch, 3)
        losses = task.losses(one, batch)
    assert task.metric in measured
    assert all(count > 0 for _, count in measured.values())
    assert measured["loss"][0] == pytest.approx(float(losses @ weights), rel=1e-4)
    assert all(value > 0 for value in task.references().values())


@pytest.mark.parametrize("name", SYNCHRONISERS)
def test_synchronisers_keep_replicas_equal(name: str) -> None:
    factory = resolve(SYNCHRONISERS, name, "sync.name")
    options = declared_options(factory)(name=name)

    def replica(transport: ThreadTransport) -> list[torch.Tensor]:
        module = TinyModel(TinyOptions(name="tiny", norm=True))
        sync = factory(ExactExchange(transport), options)
        sync.start(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for step in range(7):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step * 10 + transport.rank))
            sync.begin(5.0)
            sync.before_backward()
            loss = module(x).square().mean()
            loss.backward()
            totals = sync.before_step(5 * loss.item(), stop=step == 3 and transport.rank == 1)
            assert totals.stop == (step == 3)
            optimizer.step()
            optimizer.zero_grad()
            sync.after_step()
        sync.load_state_dict(sync.state_dict())
        sync.finish()
        assert sync.bytes_sent > 0
        return [value.detach() for value in module.state_dict().values()]

    first, *others = ThreadGroup(3).run(replica)
    assert all(all(map(torch.equal, first, other)) for other in others)
