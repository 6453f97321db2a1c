"""Evaluate models, and write the results to files, figures and tables."""
