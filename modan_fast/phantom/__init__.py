"""A synthetic archive."""
