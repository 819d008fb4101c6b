"""Backends: what computes the class pass, and which of them is in use."""
