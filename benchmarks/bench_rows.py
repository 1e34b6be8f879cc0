"""Growth with the rows of one file: writing, reading and `ktrdr gaps` of 10,000 to 4,000,000 minutes; pandas and polars.

CPU of this process; polars has an environment of its own (``.venvs/polars``, made by `make bench`), reads with all its threads.
Run by `make bench`, or: ``python benchmarks/bench_rows.py [ROWS...]``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from gateway import ROOT
from market import NOW, SERIES, NoSync, make_market, market_opens
from measuring import best, best_of_each
from rows import print_point, print_row

from ktrdr_pipelines.bars.schema import empty_bars, validate_bars
from ktrdr_pipelines.services.inspection import inspect_one
from ktrdr_pipelines.settings import load_settings
from ktrdr_pipelines.store.store import Store

ROWS_OF_THE_TABLE = 1_000_000
SIZES = (10_000, 100_000, 1_000_000, 4_000_000)
POLARS = ROOT / ".venvs" / "polars" / "bin" / "python"
READ_WITH_POLARS = """import polars, sys, time
def read():
    began = time.process_time(), time.perf_counter()
    found = polars.read_csv(sys.argv[1], try_parse_dates=True)
    assert found.height == int(sys.argv[2]) and found.schema["timestamp"].is_temporal()
    return time.process_time() - began[0], time.perf_counter() - began[1]
print(*map(min, zip(*(read() for _ in range(5)))))"""


def read_with_polars(path: Path, rows: int) -> list[float]:
    """CPU and wall seconds; nothing without its environment."""
    if not POLARS.exists():
        return []
    command = [POLARS, "-c", READ_WITH_POLARS, path, str(rows)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [float(seconds) for seconds in found.split()]


def measure(rows: int, folder: Path) -> None:
    opens_s, window = market_opens(rows)
    bars = make_market(opens_s)
    data = folder / str(rows)
    store = Store(data, disk=NoSync())
    write_s = best(lambda: store.write(SERIES, bars, answered=window, source="simulator", now=NOW), 1)
    path = store.csv_path(SERIES)
    assert np.array_equal(pd.read_csv(path)["close"], store.read_bars(SERIES)["close"])
    (data / "universe.yaml").write_text("series:\n- {symbol: BENCH, timeframes: [1m]}\n")
    settings = load_settings(data_dir=data, dagster_home=folder / "home", universe_file=data / "universe.yaml")
    read_s, pandas_s, gaps_s = best_of_each(
        lambda: Store(data).read_bars(SERIES),
        lambda: pd.read_csv(path, parse_dates=["timestamp"]),
        lambda: inspect_one("BENCH", "1m", settings),
        repeats=5 if rows <= ROWS_OF_THE_TABLE else 2,
    )
    for curve, seconds in (("write", write_s), ("read_bars", read_s), ("gaps of one series", gaps_s)):
        print_point(f"{curve}: CPU", rows, "rows", seconds, "s")
    if rows == ROWS_OF_THE_TABLE:
        compare(rows, store, read_s, pandas_s, gaps_s)


def compare(rows: int, store: Store, read_s: float, pandas_s: float, gaps_s: float) -> None:
    what = f"{rows:,} rows"
    print_row(
        f"read_bars of {what}: CPU", read_s, "s", against=pandas_s, of="pandas.read_csv", at_most=1.2, reach_unit="times"
    )  # fmt: skip
    if polars_s := read_with_polars(store.csv_path(SERIES), rows):
        of = "polars.read_csv, all threads"
        print_row(f"read_bars of {what}: CPU beside polars", read_s, "s", against=polars_s[0], of=of)
        wall_s = best(lambda: Store(store.data_dir).read_bars(SERIES), 5, time.perf_counter)
        print_row(f"read_bars of {what}: wall time beside polars", wall_s, "s", against=polars_s[1], of=of)
    print_row(
        f"ktrdr gaps of one series, {what}: CPU", gaps_s, "s", against=read_s, of="read_bars", at_most=3,
        reach_unit="times",
    )  # fmt: skip


def main(sizes: tuple[int, ...] = SIZES) -> None:
    validate_bars(empty_bars(), SERIES)  # pandera imports its backends at the first validation
    with tempfile.TemporaryDirectory(prefix="bench_rows_") as folder:
        for rows in sizes:
            measure(rows, Path(folder))


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1:])) or SIZES)
