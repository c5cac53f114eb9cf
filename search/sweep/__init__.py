"""Sweeps: many trials of one searcher, trained to the end or stopped early by a pruner."""
