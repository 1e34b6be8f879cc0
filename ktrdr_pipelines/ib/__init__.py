"""The Interactive Brokers side: codes, pacing and its ledger, client ids, contracts, client.

This module imports nothing. Only `ib/wire/library.py` imports the client library.
"""
