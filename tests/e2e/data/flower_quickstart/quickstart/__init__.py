"""An app in the form of Flower's quickstart for PyTorch."""
