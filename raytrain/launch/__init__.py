"""What starts processes: on this machine, and all that knows Ray."""
