"""Models: pretrained ones, adapters, frozen parts, heads."""
