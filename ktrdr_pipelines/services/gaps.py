"""What is held of a series, what is missing and why, and what is absent at IB, for `ktrdr gaps`.

Reads one series through `store/`, sends no request, changes nothing. `planning/coverage.py` decides which bars are missing, as
for a load; the caller passes the status of partitions (`orchestration/runs/queries.py`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

import numpy as np

from ktrdr_pipelines.calendars import BarGrid, count_expected, forming_bars
from ktrdr_pipelines.domain.arrays import IntArray
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.partitions import Recorded, partition_from_key
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.planning.coverage import GapReason, count_in_runs, find_missing_runs, widen
from ktrdr_pipelines.store.sidecar import HistoryStart, ProvenEmpty
from ktrdr_pipelines.store.store import Store

NEWEST_SHOWN = 5
"""How many of the absent ranges are shown with their evidence; all are in the sidecar."""


class Why(StrEnum):
    """Why a bar is missing. ``GONE``: its partition is recorded as complete and newer bars are held (or none at all), so it
    was in the file once. A bar after the last held one was not requested yet, whatever the record of its partition."""

    NEVER_ASKED = "never asked"
    FAILED = "failed in its last run"
    UNDER_WAY = "being loaded"
    GONE = "gone since it was loaded"


@dataclass(frozen=True, slots=True)
class Missing:
    """A run of consecutive expected bars that are complete, missing, and missing for the same reason."""

    window: Window
    bars: int
    where: GapReason
    why: Why


@dataclass(frozen=True, slots=True)
class Forming:
    """A forming bar: its open, and when it will be complete. It is not missing."""

    opens_at: datetime
    complete_at: datetime


@dataclass(frozen=True, slots=True)
class Holding:
    """What is known of one series without a request to IB."""

    series: Series
    file: str
    rows: int
    first: datetime | None
    last: datetime | None
    history_start: HistoryStart | None
    missing: Sequence[Missing]
    forming: Sequence[Forming]
    proven_ranges: int
    proven_bars: int
    newest_proven: Sequence[ProvenEmpty]
    """At most `NEWEST_SHOWN`, the one with the newest evidence first."""
    is_older_known: bool
    """False if bars before the first held one (nothing held: any bars) were never requested, as far as partitions reach."""
    notices: Sequence[str]
    damage: Sequence[str] = ()
    never_loaded: bool = False
    """Nothing is held, the sidecar has no answer of IB, and Dagster no record of a load."""

    def count_missing(self) -> dict[str, int]:
        """Missing bars by reason."""
        found: dict[str, int] = {}
        for item in self.missing:
            found[str(item.why)] = found.get(str(item.why), 0) + item.bars
        return found

    def count_older(self) -> int:
        """Missing bars before the first held one."""
        return sum(item.bars for item in self.missing if item.where == "before the first held bar")

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; times in ISO 8601 UTC, windows half-open."""
        return {
            "symbol": self.series.instrument.symbol,
            "timeframe": self.series.timeframe.name,
            "file": self.file,
            "held": {"rows": self.rows, "first": _text(self.first), "last": _text(self.last)},
            "never_loaded": self.never_loaded,
            "is_older_known": self.is_older_known,
            "history_start": self.history_start.model_dump(mode="json") if self.history_start else None,
            "missing_bars": self.count_missing(),
            "missing": [
                {**_ends(item.window), "bars": item.bars, "where": item.where, "why": str(item.why)}
                for item in self.missing
            ],
            "forming": [{"open": _text(bar.opens_at), "complete_at": _text(bar.complete_at)} for bar in self.forming],
            "proven_empty": {
                "ranges": self.proven_ranges,
                "bars": self.proven_bars,
                "newest": [item.model_dump(mode="json") for item in self.newest_proven],
            },
            "damage": list(self.damage),
            "notices": list(self.notices),
        }


def _text(instant: datetime | None) -> str | None:
    return format_instant(instant) if instant else None


def _ends(window: Window) -> dict[str, str]:
    return {"start": format_instant(window.start), "end": format_instant(window.end)}


def inspect_series(
    series: Series,
    store: Store,
    *,
    file: Path,
    earliest: datetime,
    now: datetime,
    recorded: Mapping[str, Recorded],
    notices: Sequence[str] = (),
    damage: Sequence[str] = (),
) -> Holding:
    """What is held and missing in ``store`` (settled for ``series``, see `store.snapshot.peek`) from ``earliest`` to ``now``.

    ``file`` is the CSV to name. ``earliest``: where partitions begin, nothing older can be requested. ``recorded``: status by
    partition key. The cost grows with the bars held, not with those expected.

    Raises:
        InputError: no calendar for the instrument. DataError, StoreError: the files cannot be read.
    """
    held = store.held_opens(series)
    sidecar = store.read_sidecar(series)
    first_s = int(held[0]) if len(held) else None
    expected = count_expected(series, Window(min(earliest, now), now), complete_at_s=int(now.timestamp()))
    runs = find_missing_runs(expected, held, sidecar, first_s)
    missing = explain_missing(series, expected.grid, runs, held, recorded)
    older: tuple[GapReason, GapReason] = ("nothing held", "before the first held bar")
    return Holding(
        series=series,
        file=str(file),
        rows=len(held),
        first=datetime.fromtimestamp(int(held[0]), UTC) if len(held) else None,
        last=datetime.fromtimestamp(int(held[-1]), UTC) if len(held) else None,
        history_start=sidecar.history_start,
        missing=missing,
        forming=find_forming(series, now),
        proven_ranges=len(sidecar.proven_empty),
        proven_bars=sum(item.opens for item in sidecar.proven_empty),
        newest_proven=sorted(sidecar.proven_empty, key=_asked_last, reverse=True)[:NEWEST_SHOWN],
        is_older_known=not any(item.where in older for item in missing),
        notices=tuple(notices),
        damage=tuple(damage),
        never_loaded=not len(held) and not sidecar.answered and not recorded,
    )


def count_missing(series: Series, store: Store, window: Window, now: datetime) -> int:
    """The number of missing bars of ``window`` in ``store`` (settled): expected, complete at ``now``, not held, not absent at IB.

    The cost grows with the bars held in the window.

    Raises:
        InputError: no calendar for the instrument, or the window begins before calendars do. DataError, StoreError: the
        files cannot be read.
    """
    window = Window(window.start, max(window.start, min(window.end, now)))
    if window.is_empty:
        return 0
    expected = count_expected(series, window, complete_at_s=int(now.timestamp()))
    held, extent = store.held_opens(series, widen(window)), store.extent(series)
    first_s = extent.first_open_s if extent else None
    return count_in_runs(find_missing_runs(expected, held, store.read_sidecar(series), first_s))


def describe_missing(series: Series, window: Window, missing: int) -> str:
    """The warning of every entry point that reads bars of ``window`` while some are missing."""
    return f"{series} {window}: {missing:,} expected bars are not held"


def _asked_last(item: ProvenEmpty) -> tuple[datetime, datetime]:
    return max((e.asked_at for e in item.evidence), default=item.start), item.start


def explain_missing(
    series: Series, grid: BarGrid, runs: IntArray, held: IntArray, recorded: Mapping[str, Recorded]
) -> list[Missing]:
    """Gaps: runs of consecutive bars of ``grid`` that are missing for one reason, oldest first.

    ``runs`` are those of `find_missing_runs`, ``held`` the opens of the whole file, epoch seconds, sorted. Closed time does not
    split a gap, a partition boundary only if the reason changes, and a held bar always.
    """
    if not len(runs):
        return []
    span = grid.pick(np.array([runs[0, 0], runs[-1, 1] - 1]))
    changes, reasons, sides = _find_changes(
        series, Window.from_epoch(int(span.opens[0]), int(span.opens[-1]) + 1), held, recorded
    )
    cuts = grid.count_before(changes)
    bounds = np.unique(np.concatenate([runs[:, 0], cuts]))
    of_run = np.searchsorted(runs[:, 0], bounds, side="right") - 1
    starts = bounds[(of_run >= 0) & (bounds < runs[of_run, 1])]  # not the cuts between runs
    ends = np.minimum(
        np.append(starts[1:], runs[-1, 1]), runs[np.searchsorted(runs[:, 0], starts, side="right") - 1, 1]
    )
    firsts, lasts = grid.pick(starts), grid.pick(ends - 1)
    kinds = np.searchsorted(changes, firsts.opens, side="right") - 1
    return [
        Missing(Window.from_epoch(open_s, close_s), bars, sides[kind], reasons[kind])
        for open_s, close_s, bars, kind in zip(
            firsts.opens.tolist(),
            np.maximum(lasts.closes, firsts.opens).tolist(),
            (ends - starts).tolist(),
            kinds.tolist(),
            strict=True,
        )
    ]


_WHY_OF = {Recorded.COMPLETE: Why.GONE, Recorded.FAILED: Why.FAILED, Recorded.UNDER_WAY: Why.UNDER_WAY}


def _find_changes(
    series: Series, span: Window, held: IntArray, recorded: Mapping[str, Recorded]
) -> tuple[IntArray, list[Why], list[GapReason]]:
    """Instants, epoch seconds, from which on missing bars of ``span`` have another reason or place, and both from each of them
    on. The first is not after the start of ``span``."""
    found = {_bounds_of(series.timeframe, key): _WHY_OF[status] for key, status in recorded.items()}
    found = {bounds: why for bounds, why in found.items() if bounds[1] > span.start_s}
    whys = {start_s: why for (start_s, _), why in found.items()}
    for _, end_s in found:
        whys.setdefault(end_s, Why.NEVER_ASKED)
    if min(whys, default=span.end_s) > span.start_s:
        whys[span.start_s] = Why.NEVER_ASKED
    starts = sorted(whys)
    codes = [whys[start_s] for start_s in starts]
    first_s, last_s = (int(held[0]), int(held[-1])) if len(held) else (None, None)
    marks = [at for at in (first_s, last_s + 1 if last_s is not None else None) if at is not None and starts[0] < at]
    changes: list[int] = []
    reasons: list[Why] = []
    sides: list[GapReason] = []
    for at in sorted({*starts, *marks}):
        why, where = codes[bisect_right(starts, at) - 1], place(at, first_s, last_s)
        if last_s is not None and at > last_s and why is Why.GONE:
            # The partition was complete when it was recorded; bars have become due since and were not requested yet.
            why = Why.NEVER_ASKED
        if not changes or (why, where) != (reasons[-1], sides[-1]):
            changes.append(at)
            reasons.append(why)
            sides.append(where)
    return np.array(changes, dtype=np.int64), reasons, sides


@lru_cache(maxsize=50_000)
def _bounds_of(timeframe: Timeframe, key: str) -> tuple[int, int]:
    """Start and end of a partition, epoch seconds. Kept, since many series share the grid."""
    window = partition_from_key(timeframe, key).window
    return window.start_s, window.end_s


def place(open_s: int, first_s: int | None, last_s: int | None) -> GapReason:
    """The place of a missing bar relative to the first and last held bar, ``first_s`` and ``last_s`` (None: nothing held)."""
    if first_s is None or last_s is None:
        return "nothing held"
    if open_s < first_s:
        return "before the first held bar"
    return "after the last held bar" if open_s > last_s else "between held bars"


def find_forming(series: Series, now: datetime) -> list[Forming]:
    """The forming bars of ``series`` at ``now``: begun and not complete. Empty while the market is closed.

    Raises:
        InputError: no calendar for the instrument.
    """
    bars = forming_bars(series, int(now.timestamp()))
    return [
        Forming(datetime.fromtimestamp(opens_s, UTC), datetime.fromtimestamp(closes_s, UTC))
        for opens_s, closes_s in zip(bars.opens.tolist(), bars.closes.tolist(), strict=True)
    ]
