"""Models of what a configuration scores, from those that were evaluated."""
