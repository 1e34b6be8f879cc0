"""What a load knows of its series: the bars that are held and the sidecar, read once and kept as values.

No I/O. The driver reads them before the first request; afterwards the machine adds what answers bring, and takes it away again
when the store refuses it. Only when another program changed the files in between are they read again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ktrdr_pipelines.calendars import ExpectedBars, match_held
from ktrdr_pipelines.domain.arrays import BoolArray, IntArray
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.planning.coverage import widen
from ktrdr_pipelines.store.sidecar import Sidecar


@dataclass(frozen=True, eq=False)
class HeldBars:
    """``opens`` are those of the bars held in reach of the load, sorted epoch seconds. ``first_s`` and ``last_s`` are the first
    and the last open of the whole file, which may lie outside of that; None without a bar."""

    opens: IntArray
    file_first_s: int | None = None
    file_last_s: int | None = None

    @property
    def is_empty(self) -> bool:
        return self.file_first_s is None and not len(self.opens)

    @property
    def first_s(self) -> int | None:
        """The first open of the file."""
        ends = [*self.opens[:1].tolist(), *([] if self.file_first_s is None else [self.file_first_s])]
        return min(ends, default=None)

    @property
    def last_s(self) -> int | None:
        """The last open of the file."""
        ends = [*self.opens[-1:].tolist(), *([] if self.file_last_s is None else [self.file_last_s])]
        return max(ends, default=None)

    def add(self, opens: IntArray) -> HeldBars:
        """With the bars that open at ``opens`` (sorted, unique). Costs a copy, however many are held."""
        fresh = opens[~self.contains(opens)]
        return replace(self, opens=np.insert(self.opens, np.searchsorted(self.opens, fresh), fresh))

    def contains(self, opens: IntArray) -> BoolArray:
        """For each of ``opens``: is a bar held that opens then?"""
        if not len(self.opens):
            return np.zeros(len(opens), np.bool_)
        at = np.minimum(np.searchsorted(self.opens, opens), len(self.opens) - 1)
        return np.asarray(self.opens[at] == opens, dtype=np.bool_)

    def near(self, bars: ExpectedBars) -> IntArray:
        """The opens that may satisfy one of ``bars``, whatever its label."""
        if not len(bars):
            return bars.opens
        window = widen(Window.from_epoch(int(bars.opens[0]), int(bars.opens[-1]) + 1))
        lo, hi = np.searchsorted(self.opens, [window.start_s, window.end_s])
        return self.opens[lo:hi]

    def remove(self, opens: IntArray) -> HeldBars:
        """Without the bars that open at ``opens``."""
        return replace(self, opens=np.setdiff1d(self.opens, opens, assume_unique=True))


NOTHING_HELD = HeldBars(np.empty(0, np.int64))


@dataclass
class Knowledge:
    """The current values, shared by all requests of a load."""

    timeframe: Timeframe
    held: HeldBars
    sidecar: Sidecar
    longest_whole: int = 0
    """The most bars of any answer of this load that was complete at its newest end: a shorter one is not cut there."""

    def find_missing(self, bars: ExpectedBars) -> ExpectedBars:
        """Those of ``bars`` that are not held."""
        return bars.take(np.flatnonzero(~match_held(bars, self.held.opens, self.timeframe)))
