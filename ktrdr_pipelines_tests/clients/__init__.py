"""Client libraries written by others, against the simulated gateway."""
