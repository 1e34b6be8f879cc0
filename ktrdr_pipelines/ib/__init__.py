"""The Interactive Brokers side: codes, pacing and its ledger, client ids, contracts, client.

This root imports nothing. Only `ib/wire/session.py` imports the client library.
"""
