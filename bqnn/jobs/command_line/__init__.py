"""The command line: what is typed, composed, refused and answered. Only it knows Hydra."""
