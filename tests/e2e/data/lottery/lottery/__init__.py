"""A kind of runs of somebody else: it draws models at random, and keeps the best."""
