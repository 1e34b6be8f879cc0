"""A simulated IB gateway: the TWS text protocol on a real socket, with a synthetic or a replayed market behind it.

`wire` (codec) and `session` (state machine) do no I/O; `server` owns the sockets. Shares nothing with `ktrdr_pipelines.ib`,
so that the two cannot be wrong together. Nothing is imported here: ``ktrdr --help`` stays quick.
"""
