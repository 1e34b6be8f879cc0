"""Which series a person means, and where its history starts: questions that come before a load.

The universe answers the first where it can; otherwise IB is asked, and what it said is added to the universe. The start
of history comes from the sidecar where it is known, else from IB's head timestamp, which is a hint only: the window
begins earlier by a margin, and a load asks further back when bars begin right at its start.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.series import Series, Timeframe, file_symbol
from ktrdr_pipelines.universe import Universe

SHORT_BAR_HISTORY = timedelta(days=183)
"""IB keeps bars of 30 seconds and less for six months (ib_facts.md, 5)."""


def identify_series(symbol: str, timeframe: Timeframe, universe: Universe, history: IBHistory) -> Series:
    """The series called ``symbol`` at ``timeframe``. An instrument that no universe names is looked up at IB; nothing is kept.

    Raises:
        InputError: not a symbol, or several contracts fit. PermanentError: IB knows none.
    """
    file_symbol(symbol)
    series = universe.find(symbol, timeframe)
    return series or Series(universe.find_instrument(symbol) or history.discover(symbol), timeframe)


def margin_before_head(timeframe: Timeframe) -> timedelta:
    """How much earlier than the head timestamp a full load begins, because the head can be too late."""
    if timeframe.seconds < 60:
        return timedelta(days=1)
    return timedelta(days=7) if timeframe.is_intraday else timedelta(days=62)


def estimate_history_start(series: Series, history: IBHistory, *, earliest: datetime, now: datetime) -> datetime:
    """Where a full load begins: the head timestamp less a margin, but not before ``earliest`` (the first partition), and for
    bars of 30 seconds and less not before what IB keeps. Asks IB once; without an answer it is ``earliest``."""
    if series.timeframe.seconds <= 30:
        earliest = max(earliest, now - SHORT_BAR_HISTORY)
    head = history.find_head(history.pin(series.instrument))
    if head is None:
        return earliest
    if head > now:
        raise InputError(f"IB says that {series} begins in the future ({head.isoformat()})", advice="Give --start.")
    return max(earliest, head - margin_before_head(series.timeframe))
