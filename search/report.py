"""Panels of a search's report page."""
