"""The report page of a search."""
