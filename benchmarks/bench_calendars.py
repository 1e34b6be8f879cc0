"""How quick calendars and the planner are: a session table computed and kept, bars listed and counted, plans, matching.

Run `python benchmarks/bench_calendars.py` from the project's folder. Best of five, in milliseconds; the first build is
timed once, in a fresh process, and contains the import of pandas_market_calendars. Ratios: counting twenty years against
counting a day, counting against listing, and a kept table against a computed one.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from rows import print_row

from ktrdr_pipelines.calendars import count_expected, expected_bars, match_held
from ktrdr_pipelines.calendars.session_tables import build_table
from ktrdr_pipelines.calendars.table_cache import find_table
from ktrdr_pipelines.domain.instruments import Hours, Series, forex, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.planning.coverage import missing_bars
from ktrdr_pipelines.planning.requests import plan_requests

YEARS = Window(datetime(2005, 1, 1, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC))
DAY = Window(datetime(2024, 3, 5, tzinfo=UTC), datetime(2024, 3, 6, tzinfo=UTC))


def measure(label: str, call: Callable[[], object], times: int = 5) -> float:
    best_s = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        call()
        best_s = min(best_s, time.perf_counter() - began)
    sys.stdout.write(f"{label:58s} {best_s * 1000:10.3f} ms\n")
    return best_s


def main() -> None:
    minutes = Series(stock("AAPL"), TIMEFRAMES["1m"])
    computed_s = measure("table of New York, computed", lambda: build_table("NYSE", extended=False), 1)
    with tempfile.TemporaryDirectory() as folder:
        find_table("NYSE", extended=False, folder=Path(folder))
        kept_s = measure("table of New York, kept", lambda: find_table("NYSE", extended=False, folder=Path(folder)))
    print_row("session table of New York, kept", 1e3 * kept_s, "ms", against=1e3 * computed_s, of="computed")
    expected_bars(minutes, DAY)
    listed_s = measure("20 years of 1m, listed", lambda: expected_bars(minutes, YEARS))
    counted_s = measure("20 years of 1m, counted", lambda: count_expected(minutes, YEARS))
    day_s = measure("one day of 1m, counted", lambda: count_expected(minutes, DAY))
    what = "bars of twenty years of 1m, counted"
    print_row(what, 1e3 * counted_s, "ms", against=1e3 * listed_s, of="listed")
    print_row(what, 1e3 * counted_s, "ms", against=1e3 * day_s, of="one day counted")
    for label, instrument in (("extended hours", stock("AAPL", hours=Hours.EXTENDED)), ("forex", forex("EURUSD"))):
        series = Series(instrument, TIMEFRAMES["1m"])
        measure(f"20 years of 1m, {label}, listed", lambda s=series: expected_bars(s, YEARS))  # type: ignore[misc]
    measure("one day of 1m, listed", lambda: expected_bars(minutes, DAY))
    five = Series(stock("AAPL"), TIMEFRAMES["5m"])
    measure("one day of 5m, listed", lambda: expected_bars(five, DAY))
    bars = expected_bars(minutes, YEARS)
    held = bars.opens[::2].copy()
    measure(f"match {len(bars):,} expected with {len(held):,} held", lambda: match_held(bars, held, minutes.timeframe))
    missing = missing_bars(bars, held, [], minutes.timeframe)
    for limits in HistoryLimits:
        count = len(plan_requests(minutes.timeframe, missing, limits))
        measure(
            f"plan {count:,} requests ({limits}) for {len(missing):,} missing",
            lambda limits=limits: plan_requests(minutes.timeframe, missing, limits),  # type: ignore[misc]
            1,
        )


if __name__ == "__main__":
    main()
