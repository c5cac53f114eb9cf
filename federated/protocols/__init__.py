"""What a client does in a round, and what the server adds up: one file for each method."""
