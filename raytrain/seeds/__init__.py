"""Random directions named by seeds: noise generators, sums over seeds, models as such sums."""
