"""The command line: arguments, configurations, refusals and messages. It alone uses Hydra."""
