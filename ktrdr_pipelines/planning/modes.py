"""The window that a `LoadRequest` means, from its mode and what is held: the one implementation of tail, backfill and full.

Pure. It is used twice a load with the same request: by who starts a run, because Dagster has to know the partitions before it
begins, and by the asset, which holds the series lock and resolves the window that is loaded. Which bars of the window are
missing is decided later, in `requests.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.time import Window, refuse_future
from ktrdr_pipelines.domain.timeframes import HistoryLimits
from ktrdr_pipelines.planning.open_ended import reach_from_now
from ktrdr_pipelines.planning.requests import longest_back
from ktrdr_pipelines.store.results import Extent
from ktrdr_pipelines.store.sidecar import Sidecar


@dataclass(frozen=True, slots=True)
class Held:
    """First and last bar open that the store has of a series, as far as the modes continue from there: what an earlier load
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


def begins_with_history(request: LoadRequest, held: Held | None) -> bool:
    """True if the window begins at the start of history, which then has to be known."""
    return request.start is None and (held is None or request.mode is Mode.FULL)


def reach_back(series: Series, held: Held, *, now: datetime, limits: HistoryLimits) -> datetime:
    """Where a backfill without a start begins: one longest request before the first held bar."""
    if series.instrument.ends_now:
        return reach_from_now(series, limits, int(now.timestamp())).start
    return longest_back(series, int(held.first.timestamp()), limits).start


def resolve_window(
    request: LoadRequest, held: Held | None, *, until: datetime, oldest: datetime | None = None
) -> Window:
    """The window that ``request`` means; empty when there is nothing of that kind.

    ``until`` limits its end: now, or the end of the partitions that a run is about. ``oldest`` is where it begins unless a
    start or a tail's last held bar decides: the start of history, a backfill's reach, or the start of those partitions.

    Raises:
        InputError: the request starts at ``until`` or later.
    """
    if request.start is not None:
        refuse_future(request.start, until)
    end = min(request.end or until, until)
    if held is not None and request.mode is Mode.BACKFILL:
        end = min(end, held.first)
    begin = request.start
    if begin is None and held is not None and request.mode is Mode.TAIL:
        begin = held.last
    begin = begin or oldest
    if begin is None:
        raise ValueError(f"a {request.mode} without a start needs the oldest time")
    return Window(min(begin, end), end)
