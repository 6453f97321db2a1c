"""What happens, step by step, when someone types a verb."""
