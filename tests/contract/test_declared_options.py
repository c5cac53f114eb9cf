"""Options that recipes are read by without torch, against what they are the options of."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pytorch_optimizer.base.exception import NegativeLRError
from torch import nn

from raytrain.models import options as adapters
from raytrain.models.adapters import options_from_peft, peft_config
from raytrain.optim import arguments
from raytrain.optim.arguments import optimizer_options
from raytrain.optim.ema import averages_weights
from raytrain.optim.optimizers import make_optimizer, options_from_constructor
from raytrain.optim.options import ALL_OPTIMIZERS, OptimizerOptions
from raytrain.recipe import options_parameter
from raytrain.registry import resolve
from raytrain.sync import options as sync
from raytrain.sync.options import ALL_SYNCHRONISERS, SyncOptions
from raytrain.tasks import options as tasks
from raytrain.tasks.task import TASKS, task_options
from raytrain.zeroth.optimizers import ForwardGradient, ZerothOrderOptimizer, ZOConservative, ZOHybrid

NAMES = [name for name in adapters.ADAPTERS if name != "none"]
ODD_NUMBERS = st.sampled_from([-1.0, -1e-9, 0.0, 1e-9, 0.5, 1.0, 1.5, 2.0, 3.0, 128.0])
"""Numbers at and around the limits that constructors have."""


def defaults(options: Any) -> dict[str, Any]:
    return {
        name: field.get_default(call_default_factory=True)
        for name, field in options.model_fields.items()
        if name != "groups"
    }


def test_every_table_has_its_options() -> None:
    assert tasks.TASK_OPTIONS.keys() == TASKS.keys()
    assert sync.SYNC_OPTIONS.keys() == ALL_SYNCHRONISERS.keys()
    assert arguments.OPTIMIZER_OPTIONS.keys() == ALL_OPTIMIZERS.keys()
    assert adapters.ADAPTER_OPTIONS.keys() == adapters.ADAPTERS.keys()


@pytest.mark.parametrize("name", TASKS)
def test_tasks_declare_them(name: str) -> None:
    assert task_options(resolve(TASKS, name, "task.name")) is tasks.TASK_OPTIONS[name]


@pytest.mark.parametrize("name", ALL_SYNCHRONISERS)
def test_synchronisers_declare_them(name: str) -> None:
    factory = resolve(ALL_SYNCHRONISERS, name, "sync.name")
    assert options_parameter(factory, SyncOptions) is sync.SYNC_OPTIONS[name]


@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
class TestOptimizers:
    def test_they_are_the_arguments_of_the_constructor(self, name: str) -> None:
        constructor = resolve(ALL_OPTIMIZERS, name, "optimizer.name")
        assert defaults(optimizer_options(name)) == defaults(options_from_constructor(constructor))

    def test_what_they_say_of_the_optimizer_is_so(self, name: str) -> None:
        constructor, options = resolve(ALL_OPTIMIZERS, name, "optimizer.name"), optimizer_options(name)
        assert options.zeroth == issubclass(constructor, ZerothOrderOptimizer)
        assert options.exact == issubclass(constructor, ForwardGradient)
        assert options.selects == issubclass(constructor, ZOConservative)
        assert options.hybrid == issubclass(constructor, ZOHybrid)
        assert options.averages == averages_weights(constructor)
        assert options.splits_hidden == bool(getattr(constructor, "splits_hidden", False))
        given = options(name=name)
        assert options.fuses == options_from_constructor(constructor).fuses
        made = make_optimizer(constructor, given, nn.Linear(2, 2))
        own = given.arguments().keys()
        assert own - made.defaults.keys() == options.shared

    @given(st.data())
    @settings(max_examples=60, deadline=None)
    def test_what_they_accept_the_constructor_takes(self, name: str, data: st.DataObject) -> None:
        options, constructor = optimizer_options(name), resolve(ALL_OPTIMIZERS, name, "optimizer.name")
        own = [field for field in options.model_fields if field not in OptimizerOptions.model_fields]
        changes = {}
        for field in data.draw(st.lists(st.sampled_from(own), max_size=3, unique=True)):
            default = options.model_fields[field].default
            if isinstance(default, bool) or default is None:
                changes[field] = data.draw(st.booleans())
            elif isinstance(default, tuple):
                changes[field] = [data.draw(ODD_NUMBERS) for _ in default]
            elif isinstance(default, str):
                changes[field] = data.draw(st.sampled_from([default, "original", "nonsense"]))
            else:
                number = data.draw(ODD_NUMBERS)
                changes[field] = int(number) if isinstance(default, int) else number
        try:
            given = options(name=name, **changes)
        except ValidationError:
            return
        constructor([nn.Parameter(torch.zeros(2, 2))], **given.arguments())


def test_what_a_constructor_refuses_they_refuse() -> None:
    """The other way round, where numbers are few: each of them alone at each optimizer that checks it."""
    for name in ALL_OPTIMIZERS:
        options, constructor = optimizer_options(name), resolve(ALL_OPTIMIZERS, name, "optimizer.name")
        for field, number in [(field, number) for field in defaults(options) for number in (-1.0, 0.0, 1.0, math.pi)]:
            default = options.model_fields[field].default
            if field in OptimizerOptions.model_fields or isinstance(default, bool) or not isinstance(default, float):
                continue
            taken = _takes(constructor, {field: number})
            assert _accepts(options, name, {field: number}) == taken, f"{name}: {field} = {number}"


def _takes(constructor: Any, arguments: dict[str, Any]) -> bool:
    try:
        constructor([nn.Parameter(torch.zeros(2, 2))], **arguments)
    except (ValueError, NegativeLRError):
        return False
    return True


def _accepts(options: Any, name: str, changes: dict[str, Any]) -> bool:
    try:
        options(name=name, **changes)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
class TestAdapters:
    def test_they_are_the_fields_of_the_configuration(self, name: str) -> None:
        config = resolve(adapters.ADAPTERS, name, "adapter.name")
        assert defaults(adapters.ADAPTER_OPTIONS[name]) == defaults(options_from_peft(config))

    @pytest.mark.filterwarnings("ignore")
    @given(st.data())
    @settings(max_examples=60, deadline=None)
    def test_what_they_accept_the_configuration_takes(self, name: str, data: st.DataObject) -> None:
        options = adapters.ADAPTER_OPTIONS[name]
        own = [field for field in options.model_fields if field not in ("name", "modules_to_save")]
        values = st.sampled_from(
            [True, False, 0, 1, 2, 3, -1, 0.5, "all", "none", "eva", "bat", "a.*", ["a", "b"], [1], {"a": 4}, None]
        )
        changes = {field: data.draw(values) for field in data.draw(st.lists(st.sampled_from(own), max_size=4))}
        try:
            given = options(name=name, **changes)
        except ValidationError:
            return
        peft_config(given)
