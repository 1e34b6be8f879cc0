"""Where bars are kept: one CSV per series and its sidecar. Start at `store.py`, the only module others need.

`csv_format.py` the bytes of a CSV, `splice.py` putting rows into it, `sidecar.py` what is known beside the bars,
`sidecar_views.py` how much of that a reader may believe, `integrity.py` looking for damage, `settle.py` and `foreign.py`
files that somebody else touched or made, `paths.py` names and locks, `atomic.py` the calls to the system. What a good bar
is: `bars/schema.py`. Files are described in docs/design.md, 4.
"""
