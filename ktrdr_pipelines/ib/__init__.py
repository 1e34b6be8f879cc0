"""The Interactive Brokers side: codes, pacing and its ledger, client ids, contracts, client.

This root imports nothing. Only `client.py` imports the client library.
"""
