"""bqnn: what reduced precision does to Bayesian neural networks."""
