"""From a `LoadRequest` to the run that serves it: the series, and the window that chooses its partitions.

A load and its dry run begin here, at every entry point. What is invalid by itself (a window before all partitions) is refused
before IB is asked anything. Which contract an unknown symbol means, and where its history starts, is `ib/discovery.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.ib.discovery import describe_retention, estimate_history_start, identify_series
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.planning.coverage import valid_history_start_s
from ktrdr_pipelines.planning.modes import Held, begins_with_history, reach_back, resolve_window
from ktrdr_pipelines.settings import Settings, first_partition_start
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines.universe.file import universe_of


@dataclass(frozen=True, slots=True)
class ChosenWindow:
    """The window that decides which partitions a load is about, from the first one on; empty: there is nothing to load."""

    window: Window
    oldest: datetime | None = None
    """Where it begins when neither a start nor a tail's last held bar decides; None: not needed."""
    notice: str = ""
    """Why it begins later than the request asks for."""


def identify(request: LoadRequest, settings: Settings, history: IBHistory) -> tuple[Series, LoadRequest]:
    """The series of ``request``, and the request in the universe's spelling. IB is asked only about a symbol that the universe
    does not name, or where a choice needs its contract.

    Raises:
        KtrdrError: as `refuse_before_partitions` and `discovery.identify_series`.
    """
    refuse_before_partitions(request.timeframe, request.start, request.end, settings)
    series = identify_series(request.symbol, request.timeframe, universe_of(settings), history, request.choice)
    return series, replace(request, symbol=series.instrument.symbol)


def choose_window(
    request: LoadRequest, series: Series, store: Store, history: IBHistory, settings: Settings, now: datetime
) -> ChosenWindow:
    """The window of ``request`` for what ``store`` has of ``series``. IB is asked only where history starts, and only if the
    window begins there and the sidecar does not know.

    Raises:
        InputError: invalid times; raised before IB is asked anything.
    """
    held = Held.of(store.extent(series), store.read_sidecar(series))
    first = first_partition_start(series.timeframe, settings)
    resolve_window(request, held, until=now, oldest=first)
    oldest = None
    if begins_with_history(request, held):
        oldest = _find_history_start(series, held, store, history, settings, now)
    elif held is not None and request.start is None and request.mode is Mode.BACKFILL:
        oldest = reach_back(series, held, now=now, limits=settings.history_limits)
    window = resolve_window(request, held, until=now, oldest=oldest)
    if window.is_empty:
        return ChosenWindow(window)
    refuse_before_partitions(series.timeframe, window.start, window.end, settings)
    kept = series.timeframe.retained_from(now) or first
    clipped = Window(max(window.start, first, kept), window.end)
    notice = ""
    if clipped != window:
        notice = describe_retention(series, kept) if clipped.start > first else _say_clipped(series, clipped, window)
    return ChosenWindow(clipped, oldest, notice)


def _find_history_start(
    series: Series, held: Held | None, store: Store, history: IBHistory, settings: Settings, now: datetime
) -> datetime:
    """Where the history of ``series`` starts, from its first partition on: the sidecar's knowledge, else IB's."""
    first = first_partition_start(series.timeframe, settings)
    sidecar = store.read_sidecar(series)

    def ask_ib() -> datetime:
        return estimate_history_start(series, history, earliest=first, now=now, limits=settings.history_limits)

    if series.instrument.ends_now:
        known_s = valid_history_start_s(sidecar, None) or 0
        begin = max(ask_ib(), datetime.fromtimestamp(known_s, UTC))
        return min(begin, held.first) if held is not None else begin
    known = valid_history_start_s(sidecar, int(held.first.timestamp()) if held else None)
    return ask_ib() if known is None else max(first, datetime.fromtimestamp(known, UTC))


def refuse_before_partitions(
    timeframe: Timeframe, start: datetime | None, end: datetime | None, settings: Settings
) -> None:
    """Refuse a window that ends before the first partition of ``timeframe``, or beyond IB's retention.

    Raises:
        InputError: it does.
    """
    first = first_partition_start(timeframe, settings)
    kept = timeframe.retained_from(datetime.now(UTC))
    if end is not None and kept is not None and first < end <= kept:
        raise InputError(
            f"the window ends {format_instant(end)}, beyond IB's retention: IB has {timeframe} bars for six months, from "
            f"{kept:%Y-%m-%d} on",
            advice="Give a later end, or a longer timeframe.",
        )
    if end is not None and end <= first:
        further = start or end - timedelta(days=366)
        raise InputError(
            f"the window ends {format_instant(end)}, before the first {timeframe} partition, {first:%Y-%m-%d}",
            advice=f'Set KTRDR_PARTITION_STARTS={{"{timeframe}": "{further:%Y-%m-%d}"}} to reach further back.',
        )


def _say_clipped(series: Series, clipped: Window, window: Window) -> str:
    """That less is asked for than was requested, and which setting reaches further back."""
    return (
        f"nothing before {format_instant(clipped.start)} was asked, where {series.timeframe} partitions begin; "
        f"KTRDR_PARTITION_STARTS reaches back to {window.start:%Y-%m-%d}"
    )
