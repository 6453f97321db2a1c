"""Run Jobs and sweeps, record them in folders, and print without secrets."""
