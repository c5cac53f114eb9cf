"""Search spaces of the tasks, for `search.space = "search.spaces.digits:mlp"` or as parts of your own."""
