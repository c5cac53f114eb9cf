"""The kind `train`: recipe, loop, worker, results."""
