"""Random directions named by seeds: noise generators, sums over many seeds, and models stored as such sums."""
