"""The Lightning Trainer of a job: what it logs and saves."""
