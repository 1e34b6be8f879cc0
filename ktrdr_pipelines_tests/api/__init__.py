"""Tests of the REST API: most through ASGI and without Dagster's processes, some with all processes and a simulated gateway."""
