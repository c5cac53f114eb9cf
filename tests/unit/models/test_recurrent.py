"""Recurrent language models: what a prediction depends on, and what is counted of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raytrain.models.recurrent import CELLS, RecurrentForCausalLM
from search.model_statistics import ModelStatistics
from search.recipe import SearchRecipe

VOCABULARY = 11
GATES = {"elman": 1, "gru": 3, "lstm": 4}


def model_of(cell: str, layers: int = 2, width: int = 6, dropout: float = 0.0) -> RecurrentForCausalLM:
    torch.manual_seed(0)
    return RecurrentForCausalLM(cell, VOCABULARY, layers, width, dropout).double()


def sigmoid(value: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-value))


def step(cell: str, own: dict[str, NDArray[np.float64]], x: NDArray[np.float64], h: NDArray[np.float64], c: object):
    """One step of a layer, by the equations of Elman 1990, Cho et al. 2014 and Hochreiter and Schmidhuber 1997."""
    seen = own["weight_ih_l0"] @ x + own["bias_ih_l0"]
    kept = own["weight_hh_l0"] @ h + own["bias_hh_l0"]
    if cell == "elman":
        return np.tanh(seen + kept), c
    if cell == "gru":
        (r, z, n), (r_h, z_h, n_h) = np.split(seen, 3), np.split(kept, 3)
        r, z = sigmoid(r + r_h), sigmoid(z + z_h)
        return (1 - z) * np.tanh(n + r * n_h) + z * h, c
    i, f, g, o = np.split(seen + kept, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


@pytest.mark.parametrize("cell", CELLS)
@settings(max_examples=10, deadline=None)
@given(tokens=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9), layers=st.integers(1, 3))
def test_it_is_the_recursion_of_the_papers(cell: str, tokens: list[int], layers: int) -> None:
    module = model_of(cell, layers).eval()
    embedding = module.embedding.weight.detach().numpy()
    hidden = embedding[tokens]
    for layer in module.layers:
        own = {name: weight.detach().numpy() for name, weight in layer.cell.named_parameters()}
        h, c, outputs = np.zeros(6), np.zeros(6), []
        for x in hidden:
            h, c = step(cell, own, x, h, c)
            outputs.append(h)
        hidden = np.array(outputs)
    found = module(torch.tensor([tokens])).logits[0].detach().numpy()
    np.testing.assert_allclose(found, hidden @ embedding.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_is_in_training_only(cell: str) -> None:
    module, tokens = model_of(cell, dropout=0.5), torch.arange(8).view(2, 4)
    torch.manual_seed(1)
    assert not torch.equal(module.train()(tokens).logits, module(tokens).logits)
    assert torch.equal(module.eval()(tokens).logits, module(tokens).logits)


@pytest.mark.parametrize("cell", CELLS)
def test_it_trains_in_bfloat16_and_keeps_float32(cell: str) -> None:
    module, tokens = model_of(cell).float(), torch.arange(8).view(2, 4)
    exact = module(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(tokens).logits
        rounded.sum().backward()
    assert torch.allclose(rounded.float(), exact, atol=0.05)
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in module.parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_statistics_count_its_matrices(cell: str) -> None:
    task = {"name": "text", "model": cell, "layers": 3, "width": 8, "block": 16}
    base = SearchRecipe.parse({"kind": "search", "base": {"kind": "train", "steps": 100, "task": task},
                               "search": {"space": {"optimizer": {"lr": {"type": "float", "low": 1e-3, "high": 1e-2}}}}}
                              ).base  # fmt: skip
    found = ModelStatistics(base)({})
    matrices, biases, embedding = 3 * GATES[cell] * 2 * 8 * 8, 3 * GATES[cell] * 2 * 8, 257 * 8
    assert found["parameters"] == matrices + biases + embedding, "the head has the weights of the embedding"
    assert found["flops"] == 2 * 16 * (matrices + embedding)
