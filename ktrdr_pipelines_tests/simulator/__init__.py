"""Tests of the simulated gateway, module by module."""
