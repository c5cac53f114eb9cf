"""Language models of recurrent layers."""

from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

CELLS = MappingProxyType({"elman": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM})


class RecurrentLayer(nn.Module):
    """A recurrent layer whose state is zero at the first token, and dropout.

    Args:
        cell: "elman" (tanh), "gru" or "lstm".
        width: size of its inputs and outputs.
        dropout: probability with which an output is zero in training.
    """

    def __init__(self, cell: str, width: int, dropout: float) -> None:
        super().__init__()
        self.cell = CELLS[cell](width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the outputs, shape (windows, tokens, width), for inputs of that shape."""
        with torch.autocast("cpu", enabled=False):  # oneDNN has no LSTM in bfloat16 for many processors
            outputs: Tensor = self.cell(hidden.to(self.cell.weight_hh_l0.dtype))[0]
        kept: Tensor = self.dropout(outputs)
        return kept


class RecurrentForCausalLM(nn.Module):
    """A causal language model of recurrent layers; the head has the weights of the embedding.

    Source: Press and Wolf 2017, "Using the output embedding to improve language models".

    Args:
        cell: "elman" (tanh), "gru" or "lstm".
        vocabulary: number of tokens.
        layers: number of recurrent layers.
        width: size of the embedding and of each layer.
        dropout: probability with which an output of the embedding or a layer is zero in training.

    >>> model = RecurrentForCausalLM("gru", vocabulary=257, layers=2, width=16)
    >>> model(torch.zeros(4, 8, dtype=torch.long)).logits.shape
    torch.Size([4, 8, 257])
    """

    def __init__(self, cell: str, vocabulary: int, layers: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(RecurrentLayer(cell, width, dropout) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=width**-0.5)  # of logits at most 1, as the last outputs are

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Return the logits, shape (windows, tokens, vocabulary), of `input_ids`, shape (windows, tokens)."""
        hidden = self.dropout(self.embedding(input_ids))
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.head(hidden))
