"""Read checkpoint files, and build models from their recipes."""
