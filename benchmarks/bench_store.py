"""Whether the store's costs follow the bars written: bytes and memory against the size of the file, and growth with the answers.

Bytes are those that this process hands to the system (Linux only): CSV, sidecar and journal together. Without the gateway.
Run by `make bench`, or: ``python benchmarks/bench_store.py [DAYS]``, 5,040 by default: twenty years of minutes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from market import DAY_ROWS, NOW, SERIES, NoSync, even_opens, make_market
from measuring import bytes_written, memory_mb
from rows import print_point, print_row

from ktrdr_pipelines.bars.schema import empty_bars, opens_of, validate_bars
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.store.csv_format import HEADER, render_rows
from ktrdr_pipelines.store.store import Store

LONG_ROWS = 390_000
"""21 MB."""


def window_of(bars: pd.DataFrame) -> Window:
    opens_s = opens_of(bars)
    return Window.from_epoch(int(opens_s[0]), int(opens_s[-1]) + 60)


def piece(market: pd.DataFrame, start: int, rows: int) -> pd.DataFrame:
    return market.iloc[start : start + rows].reset_index(drop=True)


def write(store: Store, bars: pd.DataFrame) -> None:
    store.write(SERIES, bars, answered=window_of(bars), source="simulator", now=NOW)


def make_file(folder: Path, bars: pd.DataFrame) -> Store:
    """A store whose series has ``bars``, all answered."""
    store = Store(folder)
    (folder / f"{SERIES.name}.csv").write_bytes(HEADER + render_rows(bars))
    store.prepare(SERIES, now=NOW)
    store.write(SERIES, empty_bars(), answered=window_of(bars), source="simulator", now=NOW)
    return store


def measure_tail(market: pd.DataFrame, folder: Path) -> None:
    """A whole load of 20 bars: what it notes at its beginning and end included."""
    store = make_file(folder, piece(market, 0, LONG_ROWS))
    before = bytes_written()
    store.note_unfinished(SERIES, None, None, now=NOW)
    write(store, piece(market, LONG_ROWS, 20))
    store.merge_journal(SERIES)
    written, size = (bytes_written() - before) / 1e6, store.csv_path(SERIES).stat().st_size / 1e6
    what = f"tail of 20 bars on a file of {size:.0f} MB: bytes written"
    print_row(what, written, "MB", against=size, of="the file", at_most=1)


def measure_memory(market: pd.DataFrame, folder: Path) -> None:
    """In a process of its own, above what the interpreter and its imports take."""
    make_file(folder, piece(market, 0, LONG_ROWS))
    piece(market, LONG_ROWS, DAY_ROWS).to_pickle(folder / "day.pickle")
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(folder)], check=True, capture_output=True, text=True
    )
    size = (folder / f"{SERIES.name}.csv").stat().st_size / 1e6
    what = f"write of {DAY_ROWS} bars to a file of {size:.0f} MB: memory"
    print_row(what, float(done.stdout), "MB", against=size, of="the file", at_most=0.25, reach_unit="times")


def run_child(folder: Path) -> None:
    day = pd.read_pickle(folder / "day.pickle")
    store = Store(folder)
    validate_bars(empty_bars(), SERIES)  # pandera imports its backends at the first validation
    before = memory_mb("VmRSS")
    write(store, day)
    print(f"{memory_mb('VmHWM') - before:.2f}")


def measure_backfill(market: pd.DataFrame, folder: Path, days: int) -> None:
    """Day by day into an empty file."""
    store = Store(folder, disk=NoSync())
    before, began = bytes_written(), time.process_time()
    each_ms = []
    for day in range(1, days + 1):
        write(store, piece(market, (day - 1) * DAY_ROWS, DAY_ROWS))
        if day in (max(1, days // 64), days // 16, days // 4, days):
            cpu_s, written = time.process_time() - began, (bytes_written() - before) / 1e6
            each_ms.append(1e3 * cpu_s / day)
            print_point("answers of a day into one file: CPU", day, "answers", cpu_s, "s")
            print_point("answers of a day into one file: bytes written", day, "answers", written, "MB")
    size = store.csv_path(SERIES).stat().st_size / 1e6
    what = f"{days:,} answers of {DAY_ROWS} bars into one file"
    print_row(
        f"{what}: bytes written", written, "MB", against=size, of="the file", at_most=3, reach_unit="times"
    )  # fmt: skip
    print_row(
        f"{what}: CPU of each", each_ms[-1], "ms", against=each_ms[1], of="of the first sixteenth", at_most=1.5,
        reach_unit="times",
    )  # fmt: skip


def main(days: int) -> None:
    market = make_market(even_opens(max(days * DAY_ROWS, LONG_ROWS + DAY_ROWS)))
    validate_bars(empty_bars(), SERIES)
    with tempfile.TemporaryDirectory(prefix="bench_store_") as scratch:

        def folder(name: str) -> Path:
            path = Path(scratch) / name
            path.mkdir()
            return path

        measure_tail(market, folder("tail"))
        measure_memory(market, folder("memory"))
        measure_backfill(market, folder("backfill"), days)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5_040)
