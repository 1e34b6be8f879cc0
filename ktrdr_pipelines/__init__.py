"""ktrdr pipelines: Interactive Brokers historical bars as Dagster partitions, one clean CSV per series.

This root imports nothing, so that `ktrdr --help` stays quick. Start reading at `series.py` (the nouns) and `load.py`
(the use case).
"""
