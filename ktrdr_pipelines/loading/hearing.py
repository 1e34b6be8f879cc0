"""What the answers to one request have told of bars that they lack, and whether that is proof. Asks nothing, writes nothing.

Keeps the answers that `asking.py` gets, knows what is held, and puts both before the judge (`evidence.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

from ktrdr_pipelines.bars.answer import Answer, IntArray
from ktrdr_pipelines.calendars import ExpectedBars, match_held
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.domain.timeframes import HistoryLimits
from ktrdr_pipelines.errors import TransientError
from ktrdr_pipelines.loading.evidence import REASONS, Doubt, Heard, judge_holes
from ktrdr_pipelines.planning.coverage import bars_inside, widen
from ktrdr_pipelines.planning.durations import NOMINAL_S
from ktrdr_pipelines.planning.requests import Request
from ktrdr_pipelines.store.store import Store

_LEAST_AROUND_S = 12 * 86400  # longer than any holiday
_EXPIRED_AFTER_S = 3 * 86400  # after its last trade date: bars may come late


class Hearing:
    """The answers to the request at hand, and what they prove."""

    def __init__(self, series: Series, *, store: Store, limits: HistoryLimits, all_expected: ExpectedBars) -> None:
        self._series, self._store, self._limits, self._all_expected = series, store, limits, all_expected
        self.complete = all_expected
        """Bars that are complete by now, inside of the request and around it."""
        self.heard: list[Heard] = []
        self._whole = 0

    def look_around(self, window: Window, now_s: int) -> None:
        """Forget former answers; know what is complete at ``now_s`` as far around ``window`` as a request for it may reach."""
        self.heard = []
        longest = self._series.timeframe.longest_request(self._limits)
        reach_s = max(_LEAST_AROUND_S, longest.count * NOMINAL_S[longest.unit])
        near = bars_inside(
            self._all_expected, Window.from_epoch(max(0, window.start_s - reach_s), window.end_s + reach_s)
        )
        self.complete = near.take(slice(0, int(np.searchsorted(near.closes, now_s, side="right"))))

    def find_doubtful(self, holes: ExpectedBars) -> ExpectedBars:
        """Those of ``holes`` that the answers so far do not prove."""
        return holes.take(np.flatnonzero(self.judge(holes) > 0))

    def judge(self, holes: ExpectedBars) -> IntArray:
        extent = self._store.extent(self._series)
        return judge_holes(
            holes,
            self.complete,
            self.heard,
            self._series.timeframe,
            whole=self._whole,
            whole_before_s=extent.last_open_s if extent is not None else 0,
        ).doubts

    def are_newest(self, holes: ExpectedBars) -> bool:
        """True if there are ``holes`` and nothing newer is known than any of them: they may only be late, or their market halted.
        No answer can show that it was not cut right before them, so they are never proven but by IB's own words: they stay
        missing and are asked for again with the next load, and the tail sensor waits longer each time
        (`orchestration/automation/tail.py`).
        """
        extent = self._store.extent(self._series)
        known_s = max((int(h.stamps[-1]) for h in self.heard if len(h.stamps)), default=0)
        newest_s = max(known_s, extent.last_open_s if extent is not None else 0)
        return len(holes) > 0 and newest_s < int(holes.opens[0])

    def leave_out_expired(self, holes: ExpectedBars, now_s: int) -> ExpectedBars:
        """``holes`` but for those on or after the last trade date of a future that has expired: nothing newer will ever come that
        could tell more, IB has said when it ends, and answers of two shapes agree."""
        try:
            last = datetime.strptime(self._series.instrument.last_trade_date, "%Y%m%d").replace(tzinfo=UTC)
        except ValueError:
            return holes
        last_s = int(last.timestamp())
        if now_s < last_s + _EXPIRED_AFTER_S:
            return holes
        return holes.take(np.flatnonzero(holes.begins < last_s))

    def reach_the_end(self, holes: ExpectedBars) -> bool:
        """True if no bar that is complete by now, and not known to be empty, is newer than ``holes``."""
        newer = self.complete.opens[self.complete.opens > holes.opens[-1]]
        for window in self.empty_windows:
            newer = newer[(newer < window.start_s) | (newer >= window.end_s)]
        return not len(newer)

    @property
    def empty_windows(self) -> Sequence[Window]:
        """What the file's sidecar knows to be empty."""
        return self._store.read_sidecar(self._series).empty_windows

    @property
    def held(self) -> IntArray:
        """Opens of the held bars around the request."""
        opens = self.complete.opens
        if not len(opens):
            return opens
        return self._store.held_opens(self._series, widen(Window.from_epoch(int(opens[0]), int(opens[-1]) + 1)))

    def are_beyond_reach(self, holes: ExpectedBars) -> bool:
        """True if there are ``holes`` at the ends of answers of a series that IB tells only up to now: no other request can show
        more of them. They stay missing."""
        sides = (Doubt.OLDER, Doubt.NEWER)
        return len(holes) > 0 and self._series.instrument.ends_now and bool(np.isin(self.judge(holes), sides).all())

    def refuse_unproven(self, doubtful: ExpectedBars, request: Request, answers: int) -> None:
        """Fail the window: bars are missing of which nobody knows whether they exist.

        Raises:
            TransientError: always.
        """
        doubts = self.judge(doubtful)
        first = format_instant(datetime.fromtimestamp(int(doubtful.opens[0]), UTC))
        why = "; ".join(REASONS[Doubt(each)] for each in np.unique(doubts[doubts > 0]))
        raise TransientError(
            f"{answers} answers lack {len(doubtful)} bars, the first {first}, and do not prove that they "
            f"do not exist: {why}",
            doing=f"loading {self._series} {request.window}",
            advice="The gateway may be cutting its answers. What arrived is in the file; run the load again later.",
        )

    def hear(self, raw: Answer, request: Request, from_s: int | None = None) -> None:
        """Keep what ``raw`` says about holes; it answers for ``from_s`` on, or the window of ``request``."""
        end_s = int(request.end.timestamp())
        stamps = np.unique(np.asarray(raw.opens_s, dtype=np.int64))
        from_s = request.window.start_s if from_s is None else from_s
        self.heard.append(Heard(from_s, end_s, stamps, bool(raw.no_data_text)))
        complete = self.complete
        owed = np.flatnonzero(complete.closes <= end_s)
        if len(stamps) and len(owed) and match_held(complete.take(owed[-1:]), stamps, self._series.timeframe).all():
            self._whole = max(self._whole, len(stamps))
