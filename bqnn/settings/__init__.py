"""Types and ranges of the values of a configuration."""
