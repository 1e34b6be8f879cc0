"""Queries about the gateway, one a module, for `ktrdr ib` and the REST API's `/ib/...`. None loads a bar.

Results are plain values with ``as_dict``, returned within a bounded time: a gateway that does not answer is reported, not
waited for.
"""
