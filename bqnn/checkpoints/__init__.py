"""Checkpoint files, the recipes in them, and the models that they describe."""
