"""Bayesian layers and the conversions that insert them; independent of tasks and training."""
