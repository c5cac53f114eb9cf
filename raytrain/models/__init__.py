"""Models: pretrained models, adapters, freezing, repeated blocks, heads and generation."""
