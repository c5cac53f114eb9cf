"""Population based training (Jaderberg et al. 2017) and its descendants."""
