"""Matplotlib figures and their style."""
