"""Quantization of networks: fuse -> prepare -> train or calibrate -> convert."""
