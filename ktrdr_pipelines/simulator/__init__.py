"""A simulated IB gateway: the TWS text protocol on a real socket, with a synthetic or a replayed market behind it.

`wire` (codec) and `client_session` (state machine) do no I/O; `server` owns the sockets. Shares no code with
`ktrdr_pipelines.ib`, so that one mistake cannot hide in both. Nothing is imported here: ``ktrdr --help`` stays quick.
"""
