"""Ranks: what is exchanged, and how ranks agree on options and errors."""
