"""How much it costs to put one missing day into the middle of a large CSV: our splice beside pandas, in one run.

Each way runs in a process of its own on the same two-million-row file (390 rows are missing in its middle) and is measured
from the start of the operation: seconds, and peak memory above what the interpreter and its imports took. The results
are compared byte for byte. Run by `make bench`, or: ``python benchmarks/bench_splice.py [rows]``.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from ktrdr_pipelines.bars.schema import COLUMNS, bars_from_columns, empty_bars, opens_of, validate_bars
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import parse_timeframe
from ktrdr_pipelines.store.atomic import Disk
from ktrdr_pipelines.store.csv_format import HEADER, render_rows
from ktrdr_pipelines.store.store import Store

SERIES = Series(stock("BENCH"), parse_timeframe("1m"))
NOW = datetime(2026, 1, 1, tzinfo=UTC)
DAY_ROWS = 390
REPEATS = 5


class NoSync(Disk):
    """For the share of the time that is spent waiting for the disk."""

    def sync(self, fd: int) -> None:
        pass


def make_market(rows: int) -> pd.DataFrame:
    """A seeded walk in cents, 390 minutes a day, like twenty years of one stock."""
    chance = np.random.default_rng(7)
    index = np.arange(rows)
    opens_s = 946_909_800 + (index // DAY_ROWS) * 86400 + (index % DAY_ROWS) * 60
    cents = 10_000 + np.abs(np.cumsum(chance.integers(-3, 4, rows)))
    open_, close = cents / 100, (cents + chance.integers(-5, 6, rows)) / 100
    high = np.maximum(open_, close) + chance.integers(0, 5, rows) / 100
    low = np.minimum(open_, close) - chance.integers(0, 5, rows) / 100
    return bars_from_columns(
        opens_s, open_, np.round(high, 2), np.round(low, 2), close, chance.integers(0, 90_000, rows)
    )


def splice_day(directory: Path, disk: Disk | None = None) -> None:
    """Our way: the store's write, lock, schema, checksum, sidecar and fsync included."""
    day = pd.read_pickle(directory / "day.pickle")
    opens_s = opens_of(day)
    window = Window.from_epoch(int(opens_s[0]), int(opens_s[-1]) + 60)
    written = Store(directory, disk=disk).write(SERIES, day, answered=window, source="simulator", now=NOW)
    assert written.rows_added == DAY_ROWS


def merge_with_pandas(directory: Path) -> None:
    """The common way: read, concat, drop duplicates, sort, write."""
    day = pd.read_pickle(directory / "day.pickle")
    path = directory / f"{SERIES.name}.csv"
    held = pd.read_csv(path, parse_dates=["timestamp"])
    merged = pd.concat([held, day]).drop_duplicates("timestamp", keep="last").sort_values("timestamp")
    merged["volume"] = merged["volume"].astype("int64")
    temporary = path.with_suffix(".tmp")
    merged.to_csv(temporary, index=False, columns=list(COLUMNS), date_format="%Y-%m-%dT%H:%M:%SZ")
    temporary.replace(path)


WAYS: dict[str, Callable[[Path], None]] = {
    "splice (ours)": splice_day,
    "splice without fsync": lambda directory: splice_day(directory, NoSync()),
    "pandas read/concat/write": merge_with_pandas,
}


def memory_mb(field: str) -> float:
    """Resident memory of this process: ``VmRSS`` now, ``VmHWM`` at its peak.

    Read from /proc, because getrusage reports a forked child's peak as at least its parent's; where there is no /proc
    both are getrusage's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith(field))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))


def measure(way: str, directory: Path) -> dict[str, float]:
    """Run ``way`` once, here; used in the child process."""
    validate_bars(empty_bars(), SERIES)  # pandera imports its backends at the first validation
    before, start = memory_mb("VmRSS"), time.perf_counter()
    WAYS[way](directory)
    return {"seconds": time.perf_counter() - start, "mb": memory_mb("VmHWM") - before}


def prepare_files(directory: Path, rows: int) -> bytes:
    """The file without its middle day, known to the store, and that day; returns the checksum of the whole file."""
    market = make_market(rows)
    middle = rows // 2 // DAY_ROWS * DAY_ROWS
    day = market.iloc[middle : middle + DAY_ROWS].reset_index(drop=True)
    whole = render_rows(market)
    hole = render_rows(day)
    at = whole.index(hole)
    path = directory / f"{SERIES.name}.csv"
    path.write_bytes(HEADER + whole[:at] + whole[at + len(hole) :])
    (directory / "whole.csv").write_bytes(HEADER + whole)
    day.to_pickle(directory / "day.pickle")
    Store(directory).prepare(SERIES, now=NOW)
    return HEADER + whole


def run_way(way: str, prepared: Path, whole: bytes) -> dict[str, float]:
    """Median of fresh runs in fresh processes on fresh copies; pandas, being slow, runs once."""
    results = []
    for _ in range(1 if "pandas" in way else REPEATS):
        with tempfile.TemporaryDirectory(dir=prepared.parent) as scratch:
            directory = Path(scratch)
            for name in (f"{SERIES.name}.csv", f"{SERIES.name}.meta.json", "day.pickle"):
                shutil.copy2(prepared / name, directory / name)
            os.sync()  # what copying left to be written is not this way's cost
            command = [sys.executable, __file__, "--child", way, str(directory)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results.append(json.loads(done.stdout))
            same = (directory / f"{SERIES.name}.csv").read_bytes() == whole
            results[-1]["same"] = float(same)
    return {key: statistics.median(result[key] for result in results) for key in ("seconds", "mb", "same")}


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")


def main(rows: int) -> None:
    """Write the table."""
    with tempfile.TemporaryDirectory(prefix="bench_splice_") as scratch:
        prepared = Path(scratch) / "prepared"
        prepared.mkdir()
        whole = prepare_files(prepared, rows)
        tell(f"one day of {DAY_ROWS} rows into the middle of {rows:,} rows ({len(whole) / 1e6:.0f} MB)\n")
        tell(f"{'way':<28}{'seconds':>10}{'peak MB above':>16}{'ratio':>9}   same bytes as the whole file")
        results = {way: run_way(way, prepared, whole) for way in WAYS}
        ours = results["splice (ours)"]["seconds"]
        for way, result in results.items():
            same = "yes" if result["same"] == 1 else "NO"
            tell(f"{way:<28}{result['seconds']:>10.3f}{result['mb']:>16.0f}{result['seconds'] / ours:>8.1f}x   {same}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        tell(json.dumps(measure(sys.argv[2], Path(sys.argv[3]))))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000)
