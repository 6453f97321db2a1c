"""Draws of a network's output, likelihoods and metrics."""
