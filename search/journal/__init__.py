"""A search on disk: its state, its decisions, and the states of its models."""
