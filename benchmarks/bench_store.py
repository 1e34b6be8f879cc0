"""Whether the store's costs follow the bars written: bytes, CPU, memory, and reading, each against its rival or limit in one run.

Bytes are those that this process hands to the system (``wchar`` in /proc/self/io; Linux only), CSV, sidecar and journal together.
Run by `make bench`, or: ``python benchmarks/bench_store.py [days]``, 5,040 by default: twenty years of minutes.
"""

from __future__ import annotations

import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from ib_insync.decoder import Decoder

from benchmarks.bench_splice import DAY_ROWS, NOW, SERIES, NoSync, make_market, memory_mb, tell
from ktrdr_pipelines.bars.schema import COLUMNS, empty_bars, opens_of, validate_bars
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.store.csv_format import HEADER, render_rows
from ktrdr_pipelines.store.store import Store

LONG_ROWS = 390_000
"""21 MB."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: what was measured, against what, and how much of it is allowed."""

    what: str
    ours: float
    rival: float
    unit: str
    allowed: float
    """Of ours divided by the rival's."""

    def __str__(self) -> str:
        ratio = self.ours / self.rival
        verdict = "" if ratio <= self.allowed else "   TOO MUCH"
        return f"{self.what:<68}{self.ours:>10,.2f}{self.rival:>10,.2f} {self.unit:<4}{ratio:>7.2f}{self.allowed:>8.2f}{verdict}"


def bytes_written() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


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


def best(repeats: int, action: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest of ``repeats`` runs, seconds."""
    took = []
    for _ in range(repeats):
        began = clock()
        action()
        took.append(clock() - began)
    return min(took)


# ---------------------------------------------------------------------------------------------------- bytes


def measure_tail(market: pd.DataFrame, folder: Path) -> Row:
    """A whole load of 20 bars: what it notes at its beginning and end included."""
    store = make_file(folder, piece(market, 0, LONG_ROWS))
    before = bytes_written()
    store.note_unfinished(SERIES, None, None, now=NOW)
    write(store, piece(market, LONG_ROWS, 20))
    store.merge_journal(SERIES)
    size = store.csv_path(SERIES).stat().st_size / 1e6
    return Row(
        f"tail of 20 bars: bytes, against the file of {size:.0f} MB",
        (bytes_written() - before) / 1e6,
        size,
        "MB",
        1 / 21,
    )


def measure_backfill(market: pd.DataFrame, folder: Path, days: int) -> list[Row]:
    """Day by day into an empty file: growth curves of bytes and CPU."""
    store, rows = Store(folder, disk=NoSync()), []
    before, began = bytes_written(), time.process_time()
    marks = {days // 8: "", days // 4: "", days // 2: "", days: ""}
    first = 0.0
    for day in range(days):
        write(store, piece(market, day * DAY_ROWS, DAY_ROWS))
        if day + 1 in marks:
            written, size = (bytes_written() - before) / 1e6, store.csv_path(SERIES).stat().st_size / 1e6
            rows.append(Row(f"{day + 1:,} answers of {DAY_ROWS} bars: bytes, against the file", written, size, "MB", 3))
            each = (time.process_time() - began) / (day + 1) * 1e3
            first = first or each
            rows.append(Row("    CPU of each, against the first eighth", each, first, "ms", 1.5))
    return rows


# ---------------------------------------------------------------------------------------------------- CPU


class Collector:
    """What the client library's decoder calls."""

    def __init__(self) -> None:
        self.bars: list[object] = []

    def historicalData(self, _: int, bar: object) -> None:  # noqa: N802 (the library's name)
        self.bars.append(bar)

    def historicalDataEnd(self, *_: object) -> None:  # noqa: N802
        pass


def decode(bars: pd.DataFrame) -> Callable[[], None]:
    """The client library's decoding of an answer with ``bars``."""
    fields = ["17", "1", "", "", str(len(bars))]
    stamps = bars["timestamp"].dt.strftime("%Y%m%d %H:%M:%S UTC")
    for stamp, row in zip(stamps, bars[list(COLUMNS[1:])].itertuples(index=False, name=None), strict=True):
        fields += [stamp, *map(repr, row), "0", "0"]

    def run() -> None:
        collector = Collector()
        Decoder(collector, 176).interpret(fields)  # type: ignore[arg-type]
        assert len(collector.bars) == len(bars)

    logging.getLogger("ib_insync").setLevel(logging.CRITICAL)
    return run


def measure_answers(market: pd.DataFrame, folder: Path) -> list[Row]:
    """The store's share of a request, on an empty and on a long file, beside the decoding of the same bars."""
    rows = []
    for size, repeats in ((7_800, 5), (DAY_ROWS, 20)):
        decoding = best(20, decode(piece(market, 0, size)), time.process_time) * 1e3
        for name, held in (("empty", 0), ("long", LONG_ROWS)):
            took = []
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                store = make_file(Path(scratch), piece(market, 0, held)) if held else Store(Path(scratch))
                for i in range(repeats):
                    bars = piece(market, held + i * size, size)
                    took.append(best(1, lambda store=store, bars=bars: write(store, bars), time.process_time) * 1e3)  # type: ignore[misc]
            what = f"write of {size:,} bars, {name} file: CPU, against the library's decoding"
            rows.append(Row(what, statistics.median(took), decoding, "ms", 1 if size > DAY_ROWS else 10))
    return rows


# ---------------------------------------------------------------------------------------------------- reading and memory


def measure_reading(market: pd.DataFrame, folder: Path) -> Row:
    store = make_file(folder, market)
    path = store.csv_path(SERIES)
    read = pd.read_csv(path, parse_dates=["timestamp"])
    assert np.array_equal(read["close"], store.read_bars(SERIES)["close"])
    ours, rival = [], []
    for _ in range(7):  # alternately, and in CPU time: other programs disturb both alike
        ours.append(best(1, lambda: store.read_bars(SERIES), time.process_time) * 1e3)
        rival.append(best(1, lambda: pd.read_csv(path, parse_dates=["timestamp"]), time.process_time) * 1e3)
    return Row(f"read_bars of {len(market):,} rows: CPU, against pandas.read_csv", min(ours), min(rival), "ms", 1.2)


def measure_memory(market: pd.DataFrame, folder: Path) -> Row:
    """In a process of its own, above what the interpreter and its imports take."""
    make_file(folder, piece(market, 0, LONG_ROWS))
    piece(market, LONG_ROWS, DAY_ROWS).to_pickle(folder / "day.pickle")
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(folder)], check=True, capture_output=True, text=True
    )
    size = (folder / f"{SERIES.name}.csv").stat().st_size / 1e6
    return Row(f"write of {DAY_ROWS} bars to the file of {size:.0f} MB: memory", float(done.stdout), size, "MB", 0.25)


def run_child(folder: Path) -> None:
    day = pd.read_pickle(folder / "day.pickle")
    store = Store(folder)
    validate_bars(empty_bars(), SERIES)  # pandera imports its backends at the first validation
    before = memory_mb("VmRSS")
    write(store, day)
    tell(f"{memory_mb('VmHWM') - before:.2f}")


def main(days: int) -> None:
    """Write the table."""
    market = make_market(max(days * DAY_ROWS, LONG_ROWS + 40_000))
    validate_bars(empty_bars(), SERIES)
    tell(f"{'':<68}{'ours':>10}{'against':>10}     {'ratio':>7}{'allowed':>8}")
    with tempfile.TemporaryDirectory(prefix="bench_store_") as scratch:

        def folder(name: str) -> Path:
            path = Path(scratch) / name
            path.mkdir()
            return path

        tell(str(measure_tail(market, folder("tail"))))
        tell(str(measure_memory(market, folder("memory"))))
        for row in measure_answers(market, folder("answers")):
            tell(str(row))
        tell(str(measure_reading(market.iloc[:1_000_000], folder("reading"))))
        for row in measure_backfill(market, folder("backfill"), days):
            tell(str(row))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5_040)
