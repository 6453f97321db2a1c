"""A job: its folder, its record, its place in a sweep, and what it may print."""
