"""A run on the disk, of any kind."""
