"""What one request costs the store on a long file: the one write of an answered day with its claim, without the gateway.

The file is twenty years of minutes with a recorded sidecar; every 20th day is missing and arrives, one day a request. Beside it
the same with a new store for each request, which parses the sidecar anew.
Run by `make bench`, or: ``python benchmarks/bench_request.py [rows]``.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from ktrdr_pipelines.bars.schema import bars_from_columns, empty_bars
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import parse_timeframe
from ktrdr_pipelines.store.store import Store

SERIES = Series(stock("BENCH"), parse_timeframe("1m"))
NOW = datetime(2026, 1, 1, tzinfo=UTC)
DAY_ROWS, DAYS_APART, REQUESTS = 390, 20, 20


def make_day(number: int) -> pd.DataFrame:
    opens_s = 946_909_800 + number * 86400 + 60 * np.arange(DAY_ROWS)
    price = 100 + np.arange(DAY_ROWS) % 77 / 8
    return bars_from_columns(opens_s, price, price + 1, price - 1, price, np.arange(DAY_ROWS) % 1000)


def window_of(number: int) -> Window:
    return Window.from_epoch(946_909_800 + number * 86400, 946_909_800 + number * 86400 + 60 * DAY_ROWS)


def settle_request(store: Store, number: int) -> None:
    """The write of one request that brings a whole day."""
    store.write(SERIES, make_day(number), answered=window_of(number), source="simulator", now=NOW)


def main() -> None:
    days = (int(sys.argv[1]) if len(sys.argv) > 1 else 1_965_600) // DAY_ROWS
    with tempfile.TemporaryDirectory() as folder:
        held = pd.concat([make_day(n) for n in range(days) if n % DAYS_APART], ignore_index=True)
        Store(Path(folder)).write(SERIES, held, answered=None, source="simulator", now=NOW)
        for start in range(1, days, DAYS_APART):
            if start < days // 2:  # windows that cannot be joined, as gaps leave them
                Store(Path(folder)).write(SERIES, empty_bars(), answered=window_of(start), source="simulator", now=NOW)
        shutil.copytree(folder, Path(folder) / "copy")
        kept = Store(Path(folder))
        took: dict[str, list[float]] = {"kept": [], "parsed anew": []}
        for request in range(REQUESTS):
            stores = {"kept": kept, "parsed anew": Store(Path(folder) / "copy")}
            for i, (name, store) in enumerate(stores.items()):
                number = DAYS_APART * (days // DAYS_APART // 2 + 2 * request + i)
                began = time.perf_counter()
                settle_request(store, number)
                took[name].append(time.perf_counter() - began)
        size = kept.sidecar_path(SERIES).stat().st_size
        print(
            f"{len(held):,} rows, sidecar {size / 1e3:,.0f} kB, {REQUESTS} requests each, median (fastest) per request:"
        )
        for name, seconds in took.items():
            print(f"  sidecar {name:12} {1e3 * statistics.median(seconds):6.1f} ms ({1e3 * min(seconds):.1f})")
        print(f"  ratio {statistics.median(took['parsed anew']) / statistics.median(took['kept']):.2f}")


if __name__ == "__main__":
    main()
