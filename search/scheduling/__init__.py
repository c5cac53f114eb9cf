"""Scheduling: segments of training, asked for and told about."""
