"""Train with Lightning: the Trainer of a job, its callbacks and its loggers."""
