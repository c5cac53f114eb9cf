import contextlib

import torch
from torch import nn

from raytrain.ema import Ema


def test_the_average_is_the_recursion_of_the_definition() -> None:
    module = nn.Linear(3, 2)
    ema, decay = Ema(module, 0.9), 0.9
    expected = {name: value.detach().clone() for name, value in module.named_parameters()}
    for step in range(1, 40):
        for value in module.parameters():
            value.data.add_(torch.randn_like(value))
        ema.update(step)
        kept = min(decay, step / (step + 9))
        for name, value in module.named_parameters():
            expected[name] = kept * expected[name] + (1 - kept) * value.detach()
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_the_module_holds_the_average_inside_the_block_only() -> None:
    module = nn.Linear(3, 2)
    ema = Ema(module, 0.5)
    first = module.weight.detach().clone()
    module.weight.data.add_(1)
    live = module.weight.detach().clone()
    before = module.weight.data_ptr()
    with contextlib.suppress(ZeroDivisionError), ema.applied():
        assert torch.equal(module.weight, first)
        1 / 0  # noqa: B018 - an error inside the block
    assert torch.equal(module.weight, live)
    assert module.weight.data_ptr() == before


def test_tied_parameters_are_averaged_once() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    ema = Ema(module, 0.5)
    module[0].weight.data.add_(1)
    ema.update(10)
    with ema.applied():
        assert torch.equal(module[0].weight, module[1].weight)
