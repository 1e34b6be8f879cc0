"""Which bars of a load are still missing, and which partitions are complete because of that. No I/O.

Every expected bar of the load has one mark. Settled requests clear the marks of their windows; a partition is reported when
none of its bars has one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

from ktrdr_pipelines.calendars import ExpectedBars, find_unexpected, match_held
from ktrdr_pipelines.domain.partitions import Partition
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.loading.actions import Action, Report
from ktrdr_pipelines.loading.context import LoadContext
from ktrdr_pipelines.loading.episode import Episode
from ktrdr_pipelines.loading.load_plan import LoadPlan
from ktrdr_pipelines.loading.report import Completed
from ktrdr_pipelines.planning.coverage import bars_inside
from ktrdr_pipelines.planning.requests import Request


class MissingBars:
    """The missing bars of one load, at first those of its plan."""

    def __init__(self, load: LoadContext, plan: LoadPlan) -> None:
        self._load, self._partitions = load, plan.partitions
        self._is_missing = plan.missing.copy()
        self._reported: set[str] = set()
        self._history_start_is_new = False

    def all(self) -> ExpectedBars:
        """The missing bars of the whole span."""
        return self._load.expected.take(np.flatnonzero(self._is_missing))

    def inside(self, window: Window) -> ExpectedBars:
        """Those that open in ``window``."""
        mine = self._indexes(window)
        return self._load.expected.take(mine.start + np.flatnonzero(self._is_missing[mine]))

    def count(self, window: Window) -> int:
        """How many open in ``window``."""
        return int(self._is_missing[self._indexes(window)].sum())

    def settle(self, episode: Episode) -> None:
        """Everything of a settled request is held or confirmed as absent now, but for bars that may only be late."""
        opens = self._load.expected.opens
        self._is_missing[self._indexes(episode.request.window)] = False
        self._is_missing[np.searchsorted(opens, episode.pending.opens)] = True
        if episode.history_start_s is not None:
            self._is_missing[: np.searchsorted(opens, episode.history_start_s)] = False
            self._history_start_is_new = True
        self._load.report.proven_empty += len(episode.absent)
        first_s = self._load.known.held.first_s
        if first_s is not None:
            absent = episode.absent
            wanted = episode.wanted.complete_at(self._load.clock.now_s)
            traded = wanted.sessions[~np.isin(wanted.opens, absent.opens)]
            self._load.report.empty_sessions += len(np.setdiff1d(absent.sessions[absent.opens > first_s], traded))

    def look_again(self, window: Window) -> None:
        """After a failure in the middle of a window: what is in the file is not missing any more."""
        mine = self._indexes(window)
        still = self._load.known.find_missing(self._load.expected.take(mine))
        self._is_missing[mine] &= np.isin(self._load.expected.opens[mine], still.opens)

    def _indexes(self, window: Window) -> slice:
        """Where the expected bars that open in ``window`` stand."""
        lo, hi = np.searchsorted(self._load.expected.opens, [window.start_s, window.end_s])
        return slice(int(lo), int(hi))

    def report_touched(self, request: Request, rows: int) -> list[Action]:
        """Report the partitions that ``request`` completed, and those complete before whose bars it changed; all that are
        still open when it showed where history starts."""
        partitions: Sequence[Partition] = self._partitions
        first = bisect_right(partitions, request.window.start, key=lambda p: p.window.end)
        last = bisect_left(partitions, request.window.end, key=lambda p: p.window.start)
        if self._history_start_is_new:
            self._history_start_is_new, first = False, 0
        actions: list[Action] = []
        for partition in partitions[first:last]:
            common = partition.window.intersect(request.window)
            if rows and common is not None and len(bars_inside(self._load.expected, common)):
                self._reported.discard(partition.key)
            if partition.key not in self._reported:
                actions += self.report_if_complete(partition)
        return actions

    def report_if_complete(self, partition: Partition) -> list[Action]:
        mine = self._indexes(partition.window)
        if self._is_missing[mine].any():
            return []
        completed = self._describe(partition, self._load.expected.take(mine))
        self._reported.add(partition.key)
        self._load.report.completed[partition.key] = completed
        return [Report(completed)]

    def _describe(self, partition: Partition, expected: ExpectedBars) -> Completed:
        load, timeframe = self._load, self._load.series.timeframe
        around = load.known.held.opens
        lo, hi = np.searchsorted(around, [partition.window.start_s, partition.window.end_s])
        held = around[lo:hi]
        return Completed(
            partition=partition,
            rows=len(held),
            first_open=datetime.fromtimestamp(int(held[0]), UTC) if len(held) else None,
            last_open=datetime.fromtimestamp(int(held[-1]), UTC) if len(held) else None,
            is_unfinished=partition.window.end_s > load.own_now_s,
            proven_empty=int((~match_held(expected, around, timeframe)).sum()),
            unexpected=int(find_unexpected(expected, held, timeframe).sum()),
        )
