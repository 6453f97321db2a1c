"""Layers and conversions of layers; nothing here knows of tasks or training."""
