"""Bars to write and read: a seeded walk in cents, like many years of minutes of one stock."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pandas as pd

from ktrdr_pipelines.bars.schema import bars_from_columns
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.arrays import IntArray
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.store.atomic import Disk

SERIES = Series(stock("BENCH"), TIMEFRAMES["1m"])
NOW = datetime(2026, 1, 1, tzinfo=UTC)
DAY_ROWS = 390


class NoSync(Disk):
    """For the share of the time that is not spent waiting for the disk."""

    def sync(self, fd: int) -> None:
        pass


def even_opens(rows: int) -> IntArray:
    """390 minutes on each day from 2000 on, weekends included: no calendar, every day the same."""
    index = np.arange(rows)
    return 946_909_800 + (index // DAY_ROWS) * 86400 + (index % DAY_ROWS) * 60


def market_opens(rows: int) -> tuple[IntArray, Window]:
    """The last ``rows`` minutes of New York before `NOW`, and their window."""
    bars = expected_bars(SERIES, Window(datetime(1980, 1, 1, tzinfo=UTC), NOW)).take(slice(-rows, None))
    return bars.opens, Window.from_epoch(int(bars.opens[0]), int(bars.closes[-1]))


def make_market(opens_s: IntArray) -> pd.DataFrame:
    """A bar at each of ``opens_s``."""
    rows, chance = len(opens_s), np.random.default_rng(7)
    cents = 10_000 + np.abs(np.cumsum(chance.integers(-3, 4, rows)))
    open_, close = cents / 100, (cents + chance.integers(-5, 6, rows)) / 100
    high = np.maximum(open_, close) + chance.integers(0, 5, rows) / 100
    low = np.minimum(open_, close) - chance.integers(0, 5, rows) / 100
    return bars_from_columns(
        opens_s, open_, np.round(high, 2), np.round(low, 2), close, chance.integers(0, 90_000, rows)
    )
