"""Zeroth-order optimisation: gradients from forward passes."""
