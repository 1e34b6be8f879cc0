"""How much it costs to put one missing day into the middle of a large CSV: our splice beside pandas, in one run.

Each way runs in a process of its own on the same two-million-row file (390 rows are missing in its middle) and is measured
from the start of the operation: seconds, and peak memory above what the interpreter and its imports took. The results
are compared byte for byte. Run by `make bench`, or: ``python benchmarks/bench_splice.py [rows]``.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from market import DAY_ROWS, NOW, SERIES, NoSync, even_opens, make_market
from measuring import memory_mb
from rows import print_row

from ktrdr_pipelines.bars.schema import COLUMNS, empty_bars, opens_of, validate_bars
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.store.atomic import Disk
from ktrdr_pipelines.store.csv_format import HEADER, render_rows
from ktrdr_pipelines.store.store import Store

REPEATS = 5


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


def measure(way: str, directory: Path) -> dict[str, float]:
    """Run ``way`` once, here; used in the child process."""
    validate_bars(empty_bars(), SERIES)  # pandera imports its backends at the first validation
    before, start = memory_mb("VmRSS"), time.perf_counter()
    WAYS[way](directory)
    return {"seconds": time.perf_counter() - start, "mb": memory_mb("VmHWM") - before}


def prepare_files(directory: Path, rows: int) -> bytes:
    """The file without its middle day, known to the store, and that day; returns the checksum of the whole file."""
    market = make_market(even_opens(rows))
    middle = rows // 2 // DAY_ROWS * DAY_ROWS
    day = market.iloc[middle : middle + DAY_ROWS].reset_index(drop=True)
    whole = render_rows(market)
    missing = render_rows(day)
    at = whole.index(missing)
    path = directory / f"{SERIES.name}.csv"
    path.write_bytes(HEADER + whole[:at] + whole[at + len(missing) :])
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


def main(rows: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bench_splice_") as scratch:
        prepared = Path(scratch) / "prepared"
        prepared.mkdir()
        whole = prepare_files(prepared, rows)
        results = {way: run_way(way, prepared, whole) for way in WAYS}
    if different := [way for way, result in results.items() if not result["same"]]:
        raise SystemExit(f"not the bytes of the whole file: {different}")
    ours, bare, pandas = results.values()
    what = f"one day into the middle of {rows:,} rows ({len(whole) / 1e6:.0f} MB)"
    of = "pandas: read, concat, sort, write"
    print_row(
        f"{what}: wall time", ours["seconds"], "s", against=pandas["seconds"], of=of, at_most=1, reach_unit="times"
    )
    print_row(f"{what}, without fsync: wall time", bare["seconds"], "s", against=pandas["seconds"], of=of)
    print_row(f"{what}: memory", ours["mb"], "MB", against=pandas["mb"], of=of, at_most=1, reach_unit="times")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]))))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000)
