"""What the modes tail, backfill and full mean: from a mode and what is held to the window to load.

Pure. How people write times is in `domain/instruments.py`; which bars of the window are missing is decided later, in
`requests.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.domain.timeframes import HistoryLimits
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.planning.open_ended import reach_from_now
from ktrdr_pipelines.planning.requests import longest_back
from ktrdr_pipelines.store.results import Extent
from ktrdr_pipelines.store.sidecar import Sidecar


class Mode(StrEnum):
    """``tail``: from the last held bar to now. ``backfill``: older than the first held bar, one longest request back or to
    the given start. ``full``: every gap between start and now. With no CSV each is a full initialisation."""

    TAIL = "tail"
    BACKFILL = "backfill"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Held:
    """First and last bar open that the store holds of a series, as far as the modes continue from there: what an earlier load
    was asked for and could not finish counts as not held, nor does anything beyond it."""

    first: datetime
    last: datetime

    @classmethod
    def of(cls, extent: Extent | None, sidecar: Sidecar) -> Held | None:
        """From the store's extent and sidecar; None without a CSV or without a row in it."""
        if extent is None:
            return None
        first, last = extent.first, extent.last
        return cls(max(first, sidecar.unfinished_until or first), min(last, sidecar.unfinished_from or last))


def needs_history_start(mode: Mode, held: Held | None, start: datetime | None) -> bool:
    """True if the window begins at the start of history, which then has to be known."""
    return start is None and (held is None or mode is Mode.FULL)


def resolve_window(
    mode: Mode,
    series: Series,
    held: Held | None,
    *,
    now: datetime,
    start: datetime | None = None,
    end: datetime | None = None,
    history_start: datetime | None = None,
    limits: HistoryLimits = HistoryLimits.CLASSIC,
) -> Window:
    """The window that ``mode`` loads; empty when there is nothing of that kind.

    ``history_start`` is needed exactly when `needs_history_start` says so. An ``end`` in the future is read as now.

    Raises:
        InputError: ``start`` is in the future.
    """
    until = min(end or now, now)
    if start is not None and start >= now:
        raise InputError(f"start {format_instant(start)} is in the future", advice="Give an earlier start.")
    if start is not None:
        begin = start
    elif held is None or mode is Mode.FULL:
        if history_start is None:
            raise ValueError("the start of history is needed and was not given")
        begin = history_start
    elif mode is Mode.TAIL:
        begin = held.last
    else:
        begin = (
            reach_from_now(series, limits, int(now.timestamp())).start
            if series.instrument.ends_now
            else longest_back(series, int(held.first.timestamp()), limits).start
        )
    if held is not None and mode is Mode.BACKFILL:
        until = min(until, held.first)
    return Window(min(begin, until), until)


def narrow_window(mode: Mode, window: Window, held: Held | None) -> Window:
    """The part of ``window`` (partitions that somebody chose) that ``mode`` loads; empty when there is none of that kind.

    Without a CSV every mode loads all of it.
    """
    if held is None or mode is Mode.FULL:
        return window
    if mode is Mode.TAIL:
        return Window(min(max(window.start, held.last), window.end), window.end)
    return Window(window.start, max(min(window.end, held.first), window.start))
