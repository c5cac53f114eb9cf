"""Directions named by a number: streams of signs or normal numbers, and all that is built from sums of them."""
