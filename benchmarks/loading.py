"""Loads inside the process of a benchmark, by the project's own path to a gateway; waits of the ledger take no time."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window, parse_range
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.ib.endpoint import GatewayAddress
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.ib.pacing.clock import Reading
from ktrdr_pipelines.loading.driver import drive
from ktrdr_pipelines.loading.report import LoadReport
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.store.store import Store


class MovingClock:
    """The real time plus what was waited for, which takes no time. For one request at a time: a jump would make the grants of
    others expire."""

    def __init__(self) -> None:
        self._waited_s = 0.0

    def sleep(self, seconds: float) -> None:
        self._waited_s += seconds

    def now_s(self) -> float:
        return time.time() + self._waited_s

    def read(self) -> Reading:
        return Reading(self.now_s(), time.monotonic() + self._waited_s, "bench")


def open_history(port: int, state: Path) -> IBHistory:
    """A history whose pacing waits take no time; its gateway must not judge them."""
    clock = MovingClock()
    address = GatewayAddress(
        "127.0.0.1", port, connect_timeout_s=15, request_timeout_s=120, retry_waits_s=(), library="ib_insync",
        state_dir=state,
    )  # fmt: skip
    return IBHistory(address, sleep=clock.sleep, clock=clock)


def load_minutes(
    history: IBHistory, store: Store, symbol: str, start: str, end: str, limits: HistoryLimits = HistoryLimits.CLASSIC
) -> LoadReport:
    """Load a window of 1-minute bars, without Dagster, one request at a time.

    Raises:
        SystemExit: anything failed.
    """
    series = Series(stock(symbol), TIMEFRAMES["1m"])
    begin, stop = parse_range(start, end)
    assert begin is not None and stop is not None
    load = Load(
        series, Window(begin, stop), store=store, history=lambda: history, limits=limits, now=lambda: datetime.now(UTC)
    )
    for _ in drive([load]):
        pass
    if load.report.failures:
        raise SystemExit(f"the load of {series} failed: {load.report.failures[0].error}")
    return load.report
