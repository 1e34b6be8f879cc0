"""Growth with the number of requests: loads of 10 to 5,000 requests of 390 minutes, from the wire to the CSV, without Dagster.

CPU of this process and the bytes that it writes (CSV, sidecar, journal, ledger, socket), against the size of the file. The
gateway has a process of its own and judges no pacing; the ledger decides every request as ever, but waits take no time. Run
by `make bench`, or: ``python benchmarks/bench_requests.py [REQUESTS...]``.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from datetime import UTC, date, datetime
from pathlib import Path

from gateway import run_gateway
from loading import load_minutes, open_history
from measuring import bytes_written, memory_folder
from rows import print_point, print_row

from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.store.store import Store

SIZES = (10, 100, 1000, 5000)
END = date(2024, 3, 1)


def first_day(requests: int) -> str:
    """The session at which a load up to `END` takes about ``requests`` requests of a session each."""
    until = datetime(END.year, END.month, END.day, tzinfo=UTC)
    window = Window(datetime(2000, 1, 1, tzinfo=UTC), until)
    sessions = expected_bars(Series(stock("AAPL"), TIMEFRAMES["1d"]), window).opens
    return datetime.fromtimestamp(int(sessions[-requests]), UTC).date().isoformat()


def main(sizes: tuple[int, ...] = SIZES) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="bench_requests_", dir=memory_folder()) as scratch,
        run_gateway("--no-judge") as gateway,
    ):
        each_ms: dict[int, float] = {}
        with open_history(gateway.port, Path(scratch)) as history:
            load_minutes(history, Store(Path(scratch) / "warm"), "MSFT", "2024-02-27", END.isoformat())
            for size in sizes:
                store = Store(Path(scratch) / str(size))
                gc.collect()
                before, began = bytes_written(), time.process_time()
                report = load_minutes(history, store, "AAPL", first_day(size), END.isoformat())
                cpu_s, written_mb = time.process_time() - began, (bytes_written() - before) / 1e6
                held_mb = next((Path(scratch) / str(size)).glob("AAPL_1m.csv")).stat().st_size / 1e6
                asked = report.ib_requests_made
                each_ms[size] = 1e3 * cpu_s / asked
                print_point("load without Dagster: CPU", asked, "requests", cpu_s, "s")
                print_point("load without Dagster: bytes written", asked, "requests", written_mb, "MB")
        print_row(
            f"{asked:,} requests of 390 bars in one load: bytes written", written_mb, "MB", against=held_mb, of="the file",
            at_most=3, reach_unit="times",
        )  # fmt: skip
        print_row(
            f"each of {sizes[-1]:,} requests of 390 bars, without Dagster: CPU", each_ms[sizes[-1]], "ms",
            against=each_ms[sizes[1]], of=f"each of {sizes[1]}", at_most=1.5, reach_unit="times",
        )  # fmt: skip


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1:])) or SIZES)
