"""Tests of the domain: pure values."""
