"""Where training examples come from, and how they reach the loop."""
