"""Searchers: one method each, which proposes configurations and learns from their scores."""
