"""From a bars message to a table of bars, against the client library's own decoder, in one run.

The library makes an object of each bar; here the columns are read, stamps become instants, and the answer is cut to its window.
Run by `make bench`, or: ``python benchmarks/bench_decode.py``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace

from ktrdr_pipelines.bars.answer import normalise_answer
from ktrdr_pipelines.bars.schema import latest_closes
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.ib.wire.decoding import columns_from_bars, read_bars_message
from ktrdr_pipelines.ib.wire.library import load_library

SERIES = Series(stock("BENCH"), TIMEFRAMES["1m"])
START_S = 1_704_205_800


def best(call: Callable[[], object]) -> float:
    found = []
    for _ in range(9):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return min(found)


def main() -> None:
    asyncio.set_event_loop(asyncio.new_event_loop())  # the library asks for one when it is imported
    library = load_library("ib_insync")
    for count in (390, 7_800, 78_000):
        fields = ["17", "1", "start", "end", str(count)]
        for i in range(count):
            price = 100 + i % 77 / 8
            fields += map(str, (START_S + 60 * i, price, price + 1, price - 1, price, i % 1000, price, i % 50))
        payload = "\0".join(fields).encode()
        window = Window.from_epoch(START_S, START_S + 60 * count)

        def read_by_library(payload: bytes = payload) -> None:
            bars: list[object] = []
            wrapper = SimpleNamespace(
                historicalData=lambda _, bar: bars.append(bar), historicalDataEnd=lambda *_: None
            )  # fmt: skip
            library.decoder(wrapper, 176).interpret(payload.decode().split("\0"))

        def read_here(payload: bytes = payload, window: Window = window) -> None:
            sent = read_bars_message(payload.decode().split("\0"))
            raw = columns_from_bars(sent, library.parse_time, intraday=True)
            closes_s = latest_closes(SERIES.timeframe, raw.opens_s)
            normalise_answer(raw, SERIES, window, now_s=2e9, closes_s=closes_s)

        theirs_s, ours_s = best(read_by_library), best(read_here)
        print(
            f"{count:6,} bars: library {1e3 * theirs_s:7.2f} ms, here {1e3 * ours_s:7.2f} ms to a table, "
            f"{theirs_s / ours_s:.2f} times its rate"
        )


if __name__ == "__main__":
    main()
