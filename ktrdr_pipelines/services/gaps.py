"""What is held of a series, what is missing and why, and what is absent at IB, for `ktrdr gaps`.

Reads one series through `store/`, sends no request, changes nothing. `planning/coverage.py` decides which bars are missing, as
for a load; the caller passes the status of partitions (`orchestration/runs/queries.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

import numpy as np

from ktrdr_pipelines.calendars import ExpectedBars, expected_bars
from ktrdr_pipelines.domain.arrays import BoolArray, IntArray
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.partitions import Recorded, partitions_in
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.planning.coverage import STAMP_SLACK_S, GapReason, mark_missing, widen
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
    brief: bool = False,
) -> Holding:
    """What is held and missing in ``store`` (settled for ``series``, see `store.snapshot.peek`) from ``earliest`` to ``now``.

    ``file`` is the CSV to name. ``earliest``: where partitions begin, nothing older can be requested. ``recorded``: status by
    partition key. ``brief``: omit missing bars before the first held one, which take minutes for a list of many series;
    ``is_older_known`` is set anyway.

    Raises:
        InputError: no calendar for the instrument. DataError, StoreError: the files cannot be read.
    """
    held = store.held_opens(series)
    sidecar = store.read_sidecar(series)
    first_s = int(held[0]) if len(held) else None
    start = min(earliest, now)
    if brief and first_s is not None:
        start = min(max(start, datetime.fromtimestamp(first_s, UTC) - timedelta(seconds=STAMP_SLACK_S)), now)
    expected = expected_bars(series, Window(start, now), complete_at_s=int(now.timestamp()))
    missing = mark_missing(expected, held, sidecar, first_s, series.timeframe)
    before = expected.opens < (expected.opens[-1] + 1 if first_s is None and len(expected) else first_s or 0)
    is_older_known = not missing[before].any()
    if brief and first_s is not None:
        missing = missing & ~before
    return Holding(
        series=series,
        file=str(file),
        rows=len(held),
        first=datetime.fromtimestamp(int(held[0]), UTC) if len(held) else None,
        last=datetime.fromtimestamp(int(held[-1]), UTC) if len(held) else None,
        history_start=sidecar.history_start,
        missing=explain_missing(series, expected, missing, held, recorded),
        forming=find_forming(series, now),
        proven_ranges=len(sidecar.proven_empty),
        proven_bars=sum(item.opens for item in sidecar.proven_empty),
        newest_proven=sorted(sidecar.proven_empty, key=_asked_last, reverse=True)[:NEWEST_SHOWN],
        is_older_known=is_older_known,
        notices=tuple(notices),
        damage=tuple(damage),
        never_loaded=not len(held) and not sidecar.answered and not recorded,
    )


def count_missing(series: Series, store: Store, window: Window, now: datetime) -> int:
    """The number of missing bars of ``window`` in ``store`` (settled): expected, complete at ``now``, not held, not absent at IB.

    The cost grows with the window.

    Raises:
        InputError: no calendar for the instrument, or the window begins before calendars do. DataError, StoreError: the
        files cannot be read.
    """
    window = Window(window.start, max(window.start, min(window.end, now)))
    if window.is_empty:
        return 0
    expected = expected_bars(series, window, complete_at_s=int(now.timestamp()))
    held, extent = store.held_opens(series, widen(window)), store.extent(series)
    first_s = extent.first_open_s if extent else None
    return int(mark_missing(expected, held, store.read_sidecar(series), first_s, series.timeframe).sum())


def describe_missing(series: Series, window: Window, missing: int) -> str:
    """The warning of every entry point that reads bars of ``window`` while some are missing."""
    return f"{series} {window}: {missing:,} expected bars are not held"


def _asked_last(item: ProvenEmpty) -> tuple[datetime, datetime]:
    return max((e.asked_at for e in item.evidence), default=item.start), item.start


def explain_missing(
    series: Series,
    expected: ExpectedBars,
    missing: BoolArray,
    held: IntArray,
    recorded: Mapping[str, Recorded],
) -> list[Missing]:
    """Gaps: runs of consecutive bars of ``expected`` that are ``missing`` for one reason, oldest first.

    ``held``: the opens of the whole file, epoch seconds, sorted. Closed time does not split a gap, a partition boundary only
    if the reason changes.
    """
    at = np.flatnonzero(missing)
    if not len(at):
        return []
    opens = expected.opens[at]
    reasons = _reasons_by_partition(series, opens, recorded)
    if len(held):
        # The partition was complete when it was recorded; bars have become due since and were not requested yet.
        reasons[(reasons == _CODES[Why.GONE]) & (opens > held[-1])] = _CODES[Why.NEVER_ASKED]
    breaks = np.flatnonzero((np.diff(at) > 1) | (np.diff(reasons) != 0)) + 1
    if len(held):  # a held bar splits a run that reaches from before it to after it
        side = np.searchsorted(held[[0, -1]], opens)
        breaks = np.union1d(breaks, np.flatnonzero(np.diff(side)) + 1)
    found = []
    for low, high in zip([0, *breaks.tolist()], [*breaks.tolist(), len(at)], strict=True):
        start_s, end_s = int(opens[low]), int(expected.closes[at[high - 1]])
        found.append(
            Missing(
                Window.from_epoch(start_s, max(start_s, end_s)),
                high - low,
                place(int(opens[low]), int(held[0]) if len(held) else None, int(held[-1]) if len(held) else None),
                _WHYS[int(reasons[low])],
            )
        )
    return found


_WHYS = tuple(Why)
_CODES = {why: code for code, why in enumerate(_WHYS)}
_WHY_OF = {Recorded.COMPLETE: Why.GONE, Recorded.FAILED: Why.FAILED, Recorded.UNDER_WAY: Why.UNDER_WAY}


def _reasons_by_partition(series: Series, opens: IntArray, recorded: Mapping[str, Recorded]) -> IntArray:
    """The code of `Why` for each of ``opens``, by the record of its partition."""
    if not recorded:
        return np.zeros(len(opens), np.int64)
    partitions = list(partitions_in(series.timeframe, Window.from_epoch(int(opens[0]), int(opens[-1]) + 1)))
    codes = np.array(
        [_CODES[_WHY_OF[recorded[p.key]] if p.key in recorded else Why.NEVER_ASKED] for p in partitions], np.int64
    )
    starts = np.array([p.window.start_s for p in partitions], np.int64)
    return codes[np.searchsorted(starts, opens, side="right") - 1]


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
    now_s = int(now.timestamp())
    around = expected_bars(series, Window.from_epoch(max(0, now_s - STAMP_SLACK_S), now_s + STAMP_SLACK_S))
    trading = around.take((around.begins <= now_s) & (around.closes > now_s))
    return [
        Forming(datetime.fromtimestamp(int(opens_s), UTC), datetime.fromtimestamp(int(closes_s), UTC))
        for opens_s, closes_s in zip(trading.opens, trading.closes, strict=True)
    ]
