"""What `ktrdr gaps` costs: the list of many series, without and with files, and one series of a million rows.

CPU seconds. The list is measured in a process of its own, beside one that only imports pandas and Dagster: ratio, and growth
from 500 to 2,000 series. The single series is compared with `Store.read_bars` of the same file, for 100,000 and 1,000,000 rows.
Run by `make bench`, or: ``python benchmarks/bench_gaps.py``.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ktrdr_pipelines.bars.schema import bars_from_columns
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.services.inspection import inspect_one
from ktrdr_pipelines.settings import load_settings
from ktrdr_pipelines.store.store import Store

NAMES = ("1m", "5m", "1h", "1d")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SMALL_ROWS = 300


def write_rows(data: Path, symbol: str, timeframe: str, rows: int) -> Series:
    """The last ``rows`` bars before `NOW`."""
    series = Series(stock(symbol), TIMEFRAMES[timeframe])
    bars = expected_bars(series, Window(datetime(2010, 1, 1, tzinfo=UTC), NOW)).take(slice(-rows, None))
    price = 100 + np.arange(len(bars)) % 77 / 8
    table = bars_from_columns(bars.opens, price, price + 1, price - 1, price, np.arange(len(bars)) % 1000)
    answered = Window.from_epoch(int(bars.opens[0]), int(bars.closes[-1]))
    Store(data).write(series, table, answered=answered, source="simulator", now=NOW)
    return series


def cpu_of(arguments: list[str], environment: dict[str, str]) -> float:
    """CPU seconds of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def environment_of(folder: Path, symbols: int) -> dict[str, str]:
    """An environment whose universe has ``symbols`` symbols at four timeframes."""
    lines = [f"- {{symbol: S{i:04d}, timeframes: [{', '.join(NAMES)}]}}" for i in range(symbols)]
    universe = folder / f"universe{symbols}.yaml"
    universe.write_text("\n".join(["series:", *lines]) + "\n")
    mine = {"KTRDR_DATA_DIR": folder / "data", "DAGSTER_HOME": folder / "home", "KTRDR_UNIVERSE": universe}
    return {**os.environ, **{name: str(path) for name, path in mine.items()}}


def measure_list(folder: Path) -> None:
    imports_s = cpu_of(["-c", "import pandas, dagster"], environment_of(folder, 1))
    print(f"imports of pandas and Dagster {imports_s:.2f} s")
    command = ["-m", "ktrdr_pipelines.cli", "gaps"]
    cpu_of(command, environment_of(folder, 1))  # keeps the calendar
    took = {n: cpu_of(command, environment_of(folder, n // len(NAMES))) for n in (4, 500, 1000, 2000)}
    for series, seconds in took.items():
        print(f"  {series:5,} series without a file {seconds:6.2f} s, {seconds / imports_s:5.2f} times the imports")
    growth = (took[2000] - took[4]) / (took[500] - took[4])
    print(f"  growth from 500 to 2,000 series: {growth:.1f} times (4 is linear)")
    for symbol in range(125):
        for name in NAMES:
            write_rows(folder / "data", f"S{symbol:04d}", name, SMALL_ROWS)
    mixed_s = cpu_of(command, environment_of(folder, 500))
    print(f"  2,000 series, 500 of them with {SMALL_ROWS} rows: {mixed_s:.2f} s, {mixed_s / imports_s:.2f} times")


def best(call: Callable[[], object]) -> float:
    found = []
    for _ in range(3):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return min(found)


def measure_one(folder: Path) -> None:
    data = folder / "large"
    for rows in (100_000, 1_000_000):
        series = write_rows(data, f"R{rows}", "1m", rows)
        (folder / "universe.yaml").write_text(f"series:\n- {{symbol: R{rows}, timeframes: [1m]}}\n")
        settings = load_settings(
            data_dir=data, dagster_home=folder / "home", universe_file=folder / "universe.yaml"
        )  # fmt: skip
        read_s = best(lambda series=series: Store(data).read_bars(series))  # type: ignore[misc]
        gaps_s = best(lambda rows=rows, settings=settings: inspect_one(f"R{rows}", "1m", settings))  # type: ignore[misc]
        print(f"gaps of one series, {rows:9,} rows: {gaps_s:.2f} s, {gaps_s / read_s:.2f} times read_bars")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        measure_list(Path(folder))
        measure_one(Path(folder))


if __name__ == "__main__":
    main()
