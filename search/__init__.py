"""Population based training and sweeps: algorithms without Ray; the command on Ray Tune is still to come."""
