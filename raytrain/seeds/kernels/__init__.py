"""Kernels that draw directions and add them up: one definition, several speeds."""
