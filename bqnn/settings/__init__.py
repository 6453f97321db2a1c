"""What each value of a configuration may be."""
