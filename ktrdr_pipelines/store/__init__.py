"""The files: one CSV per series and its sidecar. Start at `store.py`.

`csv_format.py` the bytes of a CSV, `csv_scan.py` rows of an open one, `splice.py` new rows in it, `partition_marks.py` their
checksums, `sidecar.py` what is known beside the bars, `sidecar_claims.py` how that changes, `journal.py` the changes since it was
written, `sidecar_cache.py` how both are read and saved, `identity.py` which instrument a file is for, `integrity.py` a search for
damage, `settle.py` and `foreign.py` files that another program changed or made, `locks.py`, `paths.py`, and `atomic.py` the
calls to the system. What a valid bar is: `bars/schema.py`. Files are described in docs/design.md, 4.
"""
