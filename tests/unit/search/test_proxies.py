"""Proxies: they change nothing, give the same twice, and are what NumPy makes of their formulas."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from raytrain.errors import TrainingError
from raytrain.registry import resolve
from raytrain.tasks.options import TextOptions
from raytrain.tasks.text import text
from search.proxies.attention import attention_weights, head_confidence, softmax_confidence
from search.proxies.covariance import hidden_covariance, jacobian_covariance, spectrum_score
from search.proxies.minibatch import Minibatch, Proxy
from search.proxies.weights import gradient_norm, parameter_count, snip, synaptic_diversity, synaptic_saliency, synflow
from search.tables import PROXIES

ATTENTION = ("synaptic-diversity", "head-confidence", "softmax-confidence")
FEW = settings(max_examples=10, deadline=None)
shapes = st.tuples(st.integers(2, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))


class ByteRNN(nn.Module):
    """Embeds, recurs, and normalises by batch, whose statistics a forward pass in training mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.recurrent = nn.GRU(6, 5, num_layers=2, dropout=0.5, batch_first=True)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 9)

    def forward(self, input_ids: Tensor) -> Any:
        states, _ = self.recurrent(self.embedding(input_ids))
        return SimpleNamespace(logits=self.head(self.norm(states.mT).mT))


def example(kind: str) -> tuple[nn.Module, Minibatch]:
    generator = torch.Generator().manual_seed(0)
    if kind == "rnn":
        torch.manual_seed(1)
        tokens = torch.randint(9, (4, 8), generator=generator)
        return ByteRNN(), Minibatch(tokens, lambda module, batch: module(batch).logits.logsumexp(-1).mean(1))
    task = text(TextOptions(name="text", model=kind, layers=2, heads=2, width=8, block=8))
    tokens = torch.randint(256, (4, 9), generator=generator)
    return task.model(0), Minibatch({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, task.losses)


def pairs() -> Iterator[Any]:
    for name in PROXIES:
        for kind in ("gpt", "llama", "rnn"):
            if kind != "rnn" or name not in ATTENTION:
                yield pytest.param(name, kind, id=f"{name}-{kind}")


def everything(module: nn.Module) -> list[Any]:
    tensors = [*module.parameters(), *module.buffers(), *(weight.grad for weight in module.parameters())]
    kept = [tensor if tensor is None else tensor.detach().clone() for tensor in tensors]
    modes = [(layer.training, len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in module.modules()]
    return [*kept, *modes, *(weight.requires_grad for weight in module.parameters()), torch.get_rng_state()]


@pytest.mark.parametrize(("name", "kind"), list(pairs()))
def test_a_proxy_is_a_finite_number_that_leaves_everything_as_it_was(name: str, kind: str) -> None:
    proxy: Proxy = resolve(PROXIES, name, "proxy")
    module, batch = example(kind)
    module.train()
    batch.loss(module).backward()
    next(module.parameters()).requires_grad_(False)
    before = everything(module)
    with torch.no_grad():
        score = proxy(module, batch)
    assert type(score) is float
    assert np.isfinite(score)
    for one, other in zip(before, everything(module), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    torch.rand(3)
    assert proxy(module.eval(), batch) == score, "whatever the mode and the random numbers"


@pytest.mark.parametrize("name", ATTENTION)
def test_what_needs_attention_says_so(name: str) -> None:
    with pytest.raises(TrainingError, match=f"{name}: expected .*; ByteRNN (has none|does not); "):
        resolve(PROXIES, name, "proxy")(*example("rnn"))


def test_what_needs_a_hidden_layer_says_so() -> None:
    with pytest.raises(TrainingError, match="hidden-covariance: expected recurrent layers .*; Linear has neither"):
        hidden_covariance(nn.Linear(2, 2), Minibatch(torch.ones(1, 2), lambda module, inputs: module(inputs)))


def regression(inputs: int, hidden: int, outputs: int, seed: int) -> tuple[nn.Module, Minibatch, list[Any]]:
    """A network of two matrices, with a ReLU between them, and its loss, a mean of squares."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(inputs, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, outputs, bias=False))
    for weight in module.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    x, y = torch.randn(6, inputs, generator=generator), torch.randn(6, outputs, generator=generator)
    batch = Minibatch((x, y), lambda net, pair: mse_loss(net(pair[0]), pair[1], reduction="none").mean(1))
    return module, batch, [tensor.double().numpy() for tensor in (x, y, *(w.detach() for w in module.parameters()))]


def gradients_by_hand(x: Any, y: Any, first: Any, second: Any) -> tuple[Any, Any]:
    hidden = np.maximum(x @ first.T, 0)
    error = 2 * (hidden @ second.T - y) / y.size
    return ((error @ second) * (hidden > 0)).T @ x, error.T @ hidden


@FEW
@given(shapes)
def test_proxies_of_gradients_are_those_of_the_formulas(shape: tuple[int, int, int, int]) -> None:
    module, batch, arrays = regression(*shape)
    weights, gradients = arrays[2:], gradients_by_hand(*arrays)
    saliency = sum(np.abs(w * g).sum() for w, g in zip(weights, gradients, strict=True))
    assert parameter_count(module, batch) == sum(w.size for w in weights)
    assert gradient_norm(module, batch) == pytest.approx(sum(map(np.linalg.norm, gradients)), rel=1e-4, abs=1e-6)
    assert snip(module, batch) == pytest.approx(saliency, rel=1e-4, abs=1e-6)
    assert synaptic_saliency(module, batch) == pytest.approx(saliency, rel=1e-4, abs=1e-6)
    named = nn.ModuleDict({"attention": module})
    named.forward = module.forward  # type: ignore[method-assign]
    diversity = sum(
        np.linalg.norm(w, "nuc") * np.linalg.norm(g, "nuc") for w, g in zip(weights, gradients, strict=True)
    )
    wrapped = Minibatch(batch.examples, lambda net, pair: batch.losses(net["attention"], pair))
    assert synaptic_diversity(named, wrapped) == pytest.approx(diversity, rel=1e-3, abs=1e-5)
    assert synaptic_saliency(named, wrapped) == 0


@FEW
@given(shapes, st.floats(0.5, 2))
def test_synflow_is_the_flow_through_each_layer(shape: tuple[int, int, int, int], factor: float) -> None:
    """Each of L layers passes on all of R; it grows with the L-th power of the weights, whatever the data."""
    module, batch, (_, _, first, second) = regression(*shape)
    flow = len(batch.examples[0]) * (np.abs(second) @ np.abs(first)).sum()
    assert synflow(module, batch) == pytest.approx(2 * flow, rel=1e-5)
    other = Minibatch((batch.examples[0] * 7, batch.examples[1]), batch.losses)
    assert synflow(module, other) == synflow(module, batch)
    scaled = copy.deepcopy(module)
    for weight in scaled.parameters():
        weight.data *= factor
    assert synflow(scaled, batch) == pytest.approx(factor**2 * synflow(module, batch), rel=1e-4)


@FEW
@given(shapes, st.floats(0.5, 2))
def test_a_multiple_of_the_loss_has_multiples_of_the_gradients(shape: tuple[int, int, int, int], factor: float) -> None:
    module, batch, _ = regression(*shape)
    more = Minibatch(batch.examples, lambda net, pair: factor * batch.losses(net, pair))
    for proxy in (gradient_norm, snip, synaptic_saliency):
        assert proxy(module, more) == pytest.approx(factor * proxy(module, batch), rel=1e-4, abs=1e-6)


def test_attention_weights_are_those_that_the_model_computes() -> None:
    module, batch = example("llama")
    module.set_attn_implementation("eager")
    with torch.no_grad():
        weights = module(input_ids=batch.examples["inputs"], output_attentions=True).attentions
    expected = sum(float(each.amax(-1).mean(dim=(0, 2)).sum()) for each in weights)
    assert softmax_confidence(example("llama")[0], batch) == pytest.approx(expected, rel=1e-5)


@FEW
@given(causal=st.booleans(), additive=st.booleans(), seed=st.integers(0, 99))
def test_attention_weights_give_what_torch_gives(causal: bool, additive: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, heads, 5, 4, generator=generator) for heads in (4, 2, 2))
    seen = torch.rand(5, 5, generator=generator) < 0.7
    seen.fill_diagonal_(True)
    given_mask = torch.where(seen, 0.0, -torch.inf) if additive else seen
    mask = None if causal else given_mask
    ours = attention_weights(query, key, mask, is_causal=causal) @ value.repeat_interleave(2, dim=1)
    theirs = nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)


def test_the_confidence_of_heads_is_that_of_their_projections() -> None:
    module, batch = example("gpt")
    projected: list[Tensor] = []
    for block in module.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda _layer, _inputs, output: projected.append(output.detach()))
    module.eval()(input_ids=batch.examples["inputs"])
    expected = 0.0
    for output in projected:  # queries, keys and values of two heads, four channels each
        for part in output.numpy().reshape(4, 8, 6, 4).transpose(2, 0, 1, 3):
            expected += part.max(axis=1).mean()
    assert head_confidence(example("gpt")[0], batch) == pytest.approx(expected, rel=1e-5)


@given(st.integers(2, 6), st.integers(7, 12), st.integers(0, 99))
def test_a_spectrum_is_that_of_the_correlations(rows: int, columns: int, seed: int) -> None:
    array = np.random.default_rng(seed).normal(size=(rows, columns))
    values = np.linalg.eigvalsh(np.corrcoef(array)) + 1e-5
    assert spectrum_score(array) == pytest.approx(-np.sum(np.log(values) + 1 / values), rel=1e-6)
    factors = np.random.default_rng(seed + 1).uniform(0.5, 2, size=(rows, 1))
    assert spectrum_score(factors * array[:, ::-1] + 3) == pytest.approx(spectrum_score(array), rel=1e-6)
    assert spectrum_score(array) <= -rows, "the score of rows without correlations"


def test_examples_with_one_gradient_have_the_lowest_score() -> None:
    """Those of a linear model have; those of a network with a ReLU differ."""
    _, batch, _ = regression(4, 8, 3, 0)
    straight = nn.Linear(4, 3)
    values = np.array([6.0, 0, 0, 0, 0, 0]) + 1e-5
    assert jacobian_covariance(straight, batch) == pytest.approx(-np.sum(np.log(values) + 1 / values), rel=1e-3)
    assert jacobian_covariance(regression(4, 8, 3, 0)[0], batch) > jacobian_covariance(straight, batch)


def test_hidden_units_are_those_of_the_first_recurrent_layer() -> None:
    module, batch = example("rnn")
    states, _ = module.eval().recurrent(module.embedding(batch.examples))
    units = states.detach().double().numpy().reshape(-1, 5).T
    assert hidden_covariance(module, batch) == pytest.approx(spectrum_score(units), rel=1e-6)
