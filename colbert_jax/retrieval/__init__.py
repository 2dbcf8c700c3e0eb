"""Exact late-interaction search and its measures."""
