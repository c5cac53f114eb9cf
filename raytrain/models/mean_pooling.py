"""Sequence classification with mean pooling, for sentence encoders.

This file imports nothing of raytrain: an exported folder has a copy of it, so that
`AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)` works without raytrain.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPoolingForSequenceClassification(PreTrainedModel):
    """An encoder and a linear layer on the mean of its token vectors without padding.

    Args:
        config: the encoder's, with `num_labels`.
    """

    base_model_prefix = "encoder"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.encoder = AutoModel.from_config(config)
        if hasattr(self.encoder, "pooler"):
            self.encoder.pooler = None
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(getattr(config, "hidden_dropout_prob", 0.0) if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> SequenceClassifierOutput:
        """Return the logits, shape (texts, labels), of `input_ids`, shape (texts, tokens)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        share = (mask / mask.sum(dim=1, keepdim=True)).to(hidden.dtype)
        pooled = torch.einsum("nt,ntd->nd", share, hidden)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled)))


def with_mean_pooling(encoder: PreTrainedModel) -> MeanPoolingForSequenceClassification:
    """Return a classifier of an encoder and a randomly initialized linear layer."""
    MeanPoolingForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
    with torch.device("meta"):  # without allocating a second encoder
        module = MeanPoolingForSequenceClassification(encoder.config)
    if hasattr(encoder, "pooler"):
        encoder.pooler = None
    module.encoder = encoder
    module.classifier.to_empty(device=encoder.device)
    nn.init.normal_(module.classifier.weight, std=getattr(encoder.config, "initializer_range", 0.02))
    nn.init.zeros_(module.classifier.bias)
    module.classifier.to(encoder.dtype)
    return module
