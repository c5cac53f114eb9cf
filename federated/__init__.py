"""Federated zeroth-order fine-tuning: clients send a few bytes a round, whatever the size of the model."""
