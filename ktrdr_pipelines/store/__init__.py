"""The files: one CSV per series and its sidecar. Start at `store.py`.

`csv_format.py` the bytes of a CSV, `splice.py` new rows in it, `sidecar.py` what is known beside the bars, `sidecar_claims.py`
how that changes, `sidecar_cache.py` how it is read, `identity.py` which instrument a file is for, `integrity.py` a search for
damage, `settle.py` and `foreign.py` files that another program changed or made, `locks.py`, `paths.py`, and `atomic.py` the
calls to the system. What a valid bar is: `bars/schema.py`. Files are described in docs/design.md, 4.
"""
