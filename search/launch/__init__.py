"""A search on Ray: trials in actors, the run's folder, and the same engine under Ray Tune."""
