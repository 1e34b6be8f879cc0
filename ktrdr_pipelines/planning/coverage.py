"""Which expected bars are missing, gaps, and which partitions are complete: one rule for all entry points.

Pure. The load applies it to the partitions of one run and the reconcile sensor to those of a whole file, so Dagster shows one
meaning of "complete": every expected bar of the partition, up to the last complete one, is held or absent at IB. Files are
read in `store/`; the comparison with Dagster's records is in `orchestration/automation/reconcile.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Literal

import numpy as np

from ktrdr_pipelines.calendars import BarGrid, ExpectedBars, ExpectedRange, count_expected, match_held
from ktrdr_pipelines.domain.arrays import BoolArray, IntArray
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.partitions import Partition
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.store.sidecar import Sidecar

STAMP_SLACK_S = 40 * 86400
"""How far a stamp may lie from the expected bar that it satisfies (a month labelled with its other end)."""


GapReason = Literal["nothing held", "before the first held bar", "between held bars", "after the last held bar"]


@dataclass(frozen=True, slots=True)
class Gap:
    """A run of consecutive expected bars that are missing: ``opens`` of them, in ``window`` (half-open, UTC)."""

    window: Window
    opens: int
    reason: GapReason


def missing_bars(
    expected: ExpectedBars, held_opens: IntArray, absent: Sequence[Window], timeframe: Timeframe
) -> ExpectedBars:
    """The bars of ``expected`` that are neither held nor absent.

    ``held_opens`` are sorted epoch seconds. ``absent`` are half-open windows, in any order, that may overlap; a bar is absent
    when its stamp is in one of them.
    """
    missing = ~match_held(expected, held_opens, timeframe)
    for window in absent:
        lo, hi = np.searchsorted(expected.opens, [window.start_s, window.end_s], side="left")
        missing[lo:hi] = False
    return expected.take(missing)


def find_gaps(expected: ExpectedBars, missing: ExpectedBars) -> list[Gap]:
    """Maximal runs of consecutive bars of ``expected`` that are ``missing`` (a part of it), oldest first.

    Closed time does not separate: Friday's last and Monday's first bar are consecutive. The reason is the place of the run
    among the bars of ``expected`` that are not missing.
    """
    if not len(missing):
        return []
    at = np.searchsorted(expected.opens, missing.opens)
    bounds = [0, *(np.flatnonzero(np.diff(at) > 1) + 1).tolist(), len(at)]
    gaps = []
    for lo, hi in pairwise(bounds):
        reason = _REASONS[(bool(at[lo] == 0), bool(at[hi - 1] == len(expected) - 1))]
        gaps.append(Gap(Window.from_epoch(missing.earliest_at(lo), int(missing.closes[hi - 1])), hi - lo, reason))
    return gaps


_REASONS: dict[tuple[bool, bool], GapReason] = {
    (True, True): "nothing held",
    (True, False): "before the first held bar",
    (False, False): "between held bars",
    (False, True): "after the last held bar",
}


@dataclass(frozen=True, slots=True)
class PartitionState:
    """One partition as the files have it.

    ``rows`` bars are held in it, the first at ``first_open``, the last at ``last_open``. ``missing`` counts expected bars
    that are complete and neither held nor absent; ``missing_before_last`` those of them that are older than the last held
    bar of the file (all, when nothing is held): the tail loads the others. ``is_within_known`` is false before the first and
    after the last bar that is held or absent.
    """

    partition: Partition
    rows: int
    first_open: datetime | None
    last_open: datetime | None
    missing: int
    missing_before_last: int
    is_within_known: bool

    @property
    def is_complete(self) -> bool:
        """True if no expected bar is missing."""
        return self.missing == 0


def valid_history_start_s(sidecar: Sidecar, first_held_s: int | None) -> int | None:
    """Where history starts, epoch seconds; None when unknown, or disproved by a held bar that is older."""
    if sidecar.history_start is None:
        return None
    start_s = int(sidecar.history_start.open.timestamp())
    return start_s if first_held_s is None or first_held_s >= start_s else None


def mark_missing(
    expected: ExpectedBars, held_opens: IntArray, sidecar: Sidecar, first_held_s: int | None, timeframe: Timeframe
) -> BoolArray:
    """True for each bar of ``expected`` that is neither held nor absent.

    ``held_opens`` (epoch seconds, sorted) reach `STAMP_SLACK_S` beyond ``expected`` on both sides where bars are held;
    ``first_held_s`` is the first bar of the whole file, None without one.
    """
    not_held = missing_bars(expected, held_opens, sidecar.empty_windows, timeframe)
    missing = np.isin(expected.opens, not_held.opens, assume_unique=True)
    start_s = valid_history_start_s(sidecar, first_held_s)
    if start_s is not None:
        missing &= expected.opens >= start_s
    return missing


def known_span(held_opens: IntArray, sidecar: Sidecar, grid_start: datetime) -> Window | None:
    """From the oldest to the newest bar that is held or absent; None if there is none.

    Reaches back to ``grid_start`` when the start of history is known.
    """
    first_s = [int(held_opens[0])] if len(held_opens) else []
    last_s = [int(held_opens[-1]) + 1] if len(held_opens) else []
    first_s += [e.window.start_s for e in sidecar.proven_empty]
    last_s += [e.window.end_s for e in sidecar.proven_empty]
    start_s = valid_history_start_s(sidecar, int(held_opens[0]) if len(held_opens) else None)
    if start_s is not None:
        first_s.append(int(grid_start.timestamp()))
        last_s.append(start_s)
    if not first_s or min(first_s) >= max(last_s):
        return None
    return Window.from_epoch(min(first_s), max(last_s))


def find_missing_runs(
    expected: ExpectedRange, held_opens: IntArray, sidecar: Sidecar, first_held_s: int | None
) -> IntArray:
    """The bars of ``expected`` that are neither held nor absent, as maximal runs of consecutive numbers: an array of rows
    (first, end), ``end`` excluded, oldest first.

    The same bars as `mark_missing`, without a list of those expected: the cost grows with the bars held, the absent ranges and
    the runs.
    """
    grid, first, end = expected.grid, expected.first, expected.end
    start_s = valid_history_start_s(sidecar, first_held_s)
    if start_s is not None:
        first = max(first, _count_before(grid, start_s))
    present = grid.find(held_opens)
    present = present[present >= 0]
    absent = np.array([(w.start_s, w.end_s) for w in sidecar.empty_windows], dtype=np.int64).reshape(-1, 2)
    starts = np.concatenate([present, grid.count_before(absent[:, 0])])
    ends = np.concatenate([present + 1, grid.count_before(absent[:, 1])])
    if len(absent):
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], np.maximum.accumulate(ends[order])
    # A run is missing between the end of everything before it and the next start.
    firsts = np.clip(np.concatenate([[first], ends]), first, None)
    stops = np.clip(np.concatenate([starts, [end]]), None, end)
    is_run = firsts < stops
    return np.column_stack([firsts[is_run], stops[is_run]])


def _count_before(grid: BarGrid, instant_s: int) -> int:
    return int(grid.count_before(np.array([instant_s], dtype=np.int64))[0])


def count_in_runs(runs: IntArray) -> int:
    """The number of bars in the runs of `find_missing_runs`."""
    return int((runs[:, 1] - runs[:, 0]).sum())


def judge_partitions(
    series: Series,
    partitions: Sequence[Partition],
    held_opens: IntArray,
    sidecar: Sidecar,
    *,
    grid_start: datetime,
    now: datetime,
) -> list[PartitionState]:
    """The state of each of ``partitions`` (consecutive, oldest first). ``held_opens`` are those of the whole file.

    Raises:
        InputError: no calendar is known for the instrument.
    """
    if not partitions:
        return []
    span = Window(partitions[0].window.start, partitions[-1].window.end)
    expected = count_expected(series, span, complete_at_s=int(now.timestamp()))
    first_held_s = int(held_opens[0]) if len(held_opens) else None
    runs = find_missing_runs(expected, held_opens, sidecar, first_held_s)
    known = known_span(held_opens, sidecar, grid_start)
    edges = np.array([p.window.start_s for p in partitions] + [span.end_s], dtype=np.int64)
    of_held = np.searchsorted(held_opens, edges)
    of_expected = expected.grid.count_before(edges)
    counts = np.diff(_count_missing_before(runs, of_expected))
    counts_inside = counts
    if len(held_opens):
        last_held = _count_before(expected.grid, int(held_opens[-1]))
        counts_inside = np.diff(_count_missing_before(runs, np.minimum(of_expected, last_held)))
    return [
        PartitionState(
            partition,
            rows=int(of_held[i + 1] - of_held[i]),
            first_open=_at(held_opens, of_held[i]) if of_held[i + 1] > of_held[i] else None,
            last_open=_at(held_opens, of_held[i + 1] - 1) if of_held[i + 1] > of_held[i] else None,
            missing=int(counts[i]),
            missing_before_last=int(counts_inside[i]),
            is_within_known=known is not None and known.intersect(partition.window) is not None,
        )
        for i, partition in enumerate(partitions)
    ]


def _count_missing_before(runs: IntArray, numbers: IntArray) -> IntArray:
    """How many bars of ``runs`` have a number below each of ``numbers``."""
    firsts, ends = runs[:, 0], runs[:, 1]
    sums = np.concatenate([[0], np.cumsum(ends - firsts)])
    at = np.searchsorted(firsts, numbers, side="left")
    # Runs that begin before the number count whole, except for what the last of them has beyond it.
    beyond = np.concatenate([[0], ends])[at] - numbers
    return sums[at] - np.maximum(0, beyond)


def _at(opens: IntArray, i: int) -> datetime:
    return datetime.fromtimestamp(int(opens[i]), UTC)


def bars_inside(bars: ExpectedBars, window: Window) -> ExpectedBars:
    """Those of ``bars`` that open in ``window``."""
    lo, hi = np.searchsorted(bars.opens, [window.start_s, window.end_s])
    return bars.take(slice(int(lo), int(hi)))


def widen(window: Window) -> Window:
    """``window`` with room for stamps that satisfy an expected bar without being equal to it (a week's label, a bar on the clock
    grid)."""
    return Window.from_epoch(max(0, window.start_s - STAMP_SLACK_S), window.end_s + STAMP_SLACK_S)


def unfinished_from(
    since: datetime | None, span: Window, missing: ExpectedBars, held: tuple[int, int] | None
) -> datetime | None:
    """Where tail has to begin: the first of ``missing`` (all of ``span``) from ``since`` on that is older than the last held bar.

    ``held`` is the first and the last held open, epoch seconds. ``since`` itself if it is before ``span``; None without such a
    bar, or when nothing is held.
    """
    if since is None or held is None or since < span.start:
        return since if held is not None else None
    unfinished = missing.opens[(missing.opens >= int(since.timestamp())) & (missing.opens < held[1])]
    return datetime.fromtimestamp(int(unfinished[0]), UTC) if len(unfinished) else None


def unfinished_until(
    until: datetime | None, span: Window, missing: ExpectedBars, held: tuple[int, int] | None
) -> datetime | None:
    """Where backfill has to end: the end of the last of ``missing`` before ``until`` that is newer than the first held bar.
    Otherwise as `unfinished_from`."""
    if until is None or held is None or until > span.end:
        return until if held is not None else None
    is_unfinished = (missing.opens < int(until.timestamp())) & (missing.opens > held[0])
    unfinished = missing.closes[is_unfinished]
    return datetime.fromtimestamp(int(unfinished[-1]), UTC) if len(unfinished) else None
