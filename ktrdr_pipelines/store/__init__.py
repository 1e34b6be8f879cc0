"""Where bars are kept: one CSV per series and its sidecar. Start at `series_store.py`, the only module others need.

`csvfile.py` the bytes of a CSV, `splice.py` putting rows into it, `sidecar.py` what is known beside the bars, `views.py` how much
of that a reader may believe, `verify.py` looking for damage, `intake.py` and `adopt.py` files that somebody else touched or made,
`files.py` names and locks, `disk.py` the calls to the system. What a good bar is: `bars.py`. Files are described in design,
section 4.
"""
