"""The command `raytrain`."""
