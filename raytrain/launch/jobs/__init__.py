"""Jobs of a Ray cluster: submitted, followed, fetched."""
