"""Quantization: fuse -> prepare -> train or calibrate -> convert."""
