"""Predictors of what a configuration scores, behind one interface."""
