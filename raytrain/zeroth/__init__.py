"""Zeroth-order optimization: gradients estimated from forward passes."""
