"""Loading and reading bars from a notebook or a script: what `import ktrdr_pipelines as ktrdr` offers.

As `ktrdr ib-load` does it: a load is a Dagster run that the UI shows, paced with every other process. Both functions
work inside a running event loop, as notebooks have one. Settings come from the environment and `.env` (README, Settings).
"""

from __future__ import annotations

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

from ktrdr_pipelines.domain.load_request import LoadRequest
from ktrdr_pipelines.domain.time import Time, Window, parse_range
from ktrdr_pipelines.errors import DataError, InputError
from ktrdr_pipelines.services.gaps import count_missing, describe_missing
from ktrdr_pipelines.services.membership import name_series
from ktrdr_pipelines.settings import Settings, load_settings
from ktrdr_pipelines.store.schedule_overrides import open_store
from ktrdr_pipelines.store.snapshot import peek

if TYPE_CHECKING:
    import pandas as pd

    from ktrdr_pipelines.loading.report import LoadReport


class IncompleteBars(UserWarning):
    """The window that was read has missing bars: expected, neither held nor confirmed absent."""


def load(
    symbol: str,
    timeframe: str,
    mode: Literal["tail", "backfill", "full"] = "tail",
    *,
    start: Time | None = None,
    end: Time | None = None,
    progress: bool | None = None,
    settings: Settings | None = None,
) -> LoadReport:
    """Load the missing bars of ``symbol`` at ``timeframe`` from Interactive Brokers into the series' CSV.

    ::

        >>> ktrdr.load("AAPL", "1h", "full", start="2024-01-01").fetched_bars
        304

    Args:
        symbol: A name of the universe ("AAPL", "EURUSD", "BRK B"); another one is looked up at IB and added.
        timeframe: "1s" to "1mo"; `ktrdr gaps --help` and README list them.
        mode: "tail" from the last held bar to now; "backfill" older than the first held bar, one longest request back or to
            ``start``; "full" every gap between start and now. With no CSV each is a full initialisation.
        start: Included. A time without a zone is UTC in text and refused as a datetime.
        end: Not included; now without it.
        progress: Show progress on stderr; without it, if that is a terminal or a notebook's.
        settings: Instead of those of the environment.

    Returns:
        What was done: ``status``, ``fetched_bars``, ``ib_requests_made``, ``merged_file`` and more; ``as_dict()`` gives all.

    Raises:
        InputError: Invalid input, or the symbol means several contracts.
        PermanentError: IB refuses: no such contract, no permission.
        TransientError: IB or the way to it is in trouble after all retries (GatewayUnreachable: no gateway answers).
        DataError: IB's bars, or the file, break the rules for bars.
        StoreError: The disk refuses.
        All are `ktrdr_pipelines.errors.KtrdrError`. When only some windows failed, the first failure is raised after the
        others were loaded and kept; its notes name the rest.
    """
    from ktrdr_pipelines.services.load import load_series
    from ktrdr_pipelines.services.progress import Progress

    request = LoadRequest.parse(symbol, timeframe, mode, start=start, end=end, now=datetime.now(UTC))
    is_shown = _is_watched() if progress is None else progress
    # In a thread of its own: Dagster cannot execute a run where an event loop is running, as in a notebook's cell.
    with Progress(enabled=is_shown) as shown, ThreadPoolExecutor(1, "ktrdr-load") as thread:
        result = thread.submit(load_series, request, progress=shown, settings=settings, origin="notebook").result()
    failures = result.report.failures
    if failures:
        error = failures[0].error
        for failure in failures[1:]:
            error.add_note(f"{failure.window} failed as well: {failure.error}")
        error.add_note(f"{result.report.fetched_bars} bars were loaded and kept.")
        raise error
    return result.report


def read_bars(
    symbol: str,
    timeframe: str,
    start: Time | None = None,
    end: Time | None = None,
    *,
    missing: Literal["warn", "raise", "ignore"] = "warn",
    settings: Settings | None = None,
) -> pd.DataFrame:
    """The held bars of ``symbol`` at ``timeframe`` whose open lies in the window. Asks IB nothing and changes nothing.

    ::

        >>> ktrdr.read_bars("AAPL", "1h", "2024-01-02", "2024-01-03").head(2)
                          timestamp    open    high     low   close     volume
        0 2024-01-02 14:30:00+00:00  187.15  187.44  183.89  184.82  1903316.0
        1 2024-01-02 15:00:00+00:00  184.82  186.12  184.30  185.97  2417015.0

    Args:
        symbol: A name of the universe.
        timeframe: "1s" to "1mo".
        start: Included; without it from the first held bar. As for `load`.
        end: Not included; without it to the last held bar.
        missing: What to do when the window (up to the last complete bar) has expected bars that are neither held nor
            confirmed absent: "warn" with `IncompleteBars`, "raise" DataError, or "ignore".
        settings: Instead of those of the environment.

    Returns:
        A DataFrame with a RangeIndex, oldest bar first, stamps strictly increasing, and these columns:

        * ``timestamp``: ``datetime64[us, UTC]``, the bar's start; daily and longer bars carry their session date at midnight
          UTC. ``bars["timestamp"].dt.tz_convert("America/New_York")`` shows another zone.
        * ``open``, ``high``, ``low``, ``close``: ``float64``, in the instrument's currency per unit, as IB sends them
          (split-adjusted for stocks; dividends only in series of ADJUSTED_LAST).
        * ``volume``: ``float64``, in the unit IB uses (shares for US stocks, contracts for futures), 0 where IB has none
          (currency pairs, indices).

        A bar that still trades is never held. No rows: nothing of the window is held.

    Raises:
        InputError: Invalid input, the universe has no such series, or no bar of it is held at all.
        DataError: The file breaks the rules for bars; or bars are missing and ``missing="raise"``.
        StoreError: The disk refuses.
    """
    if missing not in ("warn", "raise", "ignore"):
        raise InputError(f"unknown missing={str(missing)[:40]!r}", advice="Use one of warn, raise, ignore.")
    first, last = parse_range(start, end)
    settings = settings or load_settings()
    series = name_series(symbol, timeframe, settings)
    now = datetime.now(UTC)
    with peek(open_store(settings.data_dir), series, now=now) as (store, _):
        extent = store.extent(series)
        if extent is None:
            raise InputError(
                f"nothing is held of {series}",
                advice=f"Load it first: ktrdr.load({series.instrument.symbol!r}, {series.timeframe.name!r}).",
            )
        begin = first or extent.first
        window = Window(begin, max(last or extent.last + timedelta(seconds=1), begin))
        bars = store.read_bars(series, window)
        missing_bars = 0 if missing == "ignore" else count_missing(series, store, window, now)
    if missing_bars:
        text = describe_missing(series, window, missing_bars)
        advice = "`ktrdr gaps` shows which and why; ktrdr.load(…, 'full') asks for them."
        if missing == "raise":
            raise DataError(text, advice=advice)
        warnings.warn(f"{text}. {advice}", IncompleteBars, stacklevel=2)
    return bars


def _is_watched() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
