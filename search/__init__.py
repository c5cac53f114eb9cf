"""Population based training and architecture search on Ray Tune, which is still to come."""
