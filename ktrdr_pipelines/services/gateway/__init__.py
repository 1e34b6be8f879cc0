"""What can be asked about the gateway without loading bars: a module per question, for `ktrdr ib` and the REST API's `/ib/...`.

Answers are plain values with ``as_dict``. Nothing is printed here, no bars are asked for, and every answer comes within a
bounded time: a gateway that does not answer is told about, not waited for.
"""
