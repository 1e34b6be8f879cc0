"""Tests of the REST API: most through ASGI, loads over a real socket with a worker process and a simulated gateway."""
