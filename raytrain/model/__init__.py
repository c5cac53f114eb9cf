"""What is done to a model before it is trained: adapters, frozen parts, blocks."""
