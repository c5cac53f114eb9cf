"""Federated, zeroth-order fine-tuning on Flower, which is still to come."""
