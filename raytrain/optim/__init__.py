"""Optimizers, parameter groups, learning-rate schedules, weight averages and gradient noise."""
