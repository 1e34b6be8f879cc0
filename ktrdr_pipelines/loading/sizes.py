"""How many bars one request asks for, under limits that allow answers which take long: by the times of earlier answers.

IB's present limits allow a year of hours or a month of minutes in one request, which some gateways need minutes for
(docs/ib_facts.md, 6). A request that is not answered in time is asked for in halves.
"""

from __future__ import annotations

from functools import partial

from ktrdr_pipelines.calendars import ExpectedBars
from ktrdr_pipelines.domain.timeframes import HistoryLimits, Timeframe
from ktrdr_pipelines.planning.requests import Request, plan_requests

GOOD_ANSWER_S = 30.0
"""Answers are to take so long at most: a quarter of the time-out, since times differ from one answer to the next."""


class RequestSizes:
    """The size of a load's requests. ``most_bars``: of one request; None: as many as the limits allow."""

    def __init__(self, timeframe: Timeframe, limits: HistoryLimits) -> None:
        self._timeframe, self._limits = timeframe, limits
        self.most_bars: int | None = None

    def may_shrink(self, bars: ExpectedBars) -> bool:
        """Whether the ``bars`` of a request could be asked for in smaller parts: those that the classic limits allow at least."""
        if self._limits is HistoryLimits.CLASSIC:
            return False
        return len(bars) > 1 and len(plan_requests(self._timeframe, bars, HistoryLimits.CLASSIC)) > 1

    def note_answer(self, bars: int, seconds: float | None) -> bool:
        """An answer of ``bars`` took ``seconds``. True when requests have to be smaller from now on; an empty one shows nothing
        about that."""
        if self._limits is HistoryLimits.CLASSIC or not bars or seconds is None or seconds <= GOOD_ANSWER_S:
            return False
        return self._shrink(max(1, int(bars * GOOD_ANSWER_S / seconds)))

    def note_time_out(self, bars: int) -> None:
        """A request for ``bars`` was not answered in time."""
        self._shrink(max(1, -(-bars // 2)))

    def _shrink(self, most_bars: int) -> bool:
        if self.most_bars is not None and self.most_bars <= most_bars:
            return False
        self.most_bars = most_bars
        return True

    def divide(self, request: Request, bars: ExpectedBars, expected: ExpectedBars) -> list[Request]:
        """``request`` for ``bars`` in parts of the present size, oldest first; itself when it is small enough. None is smaller
        than the classic limits allow: an answer of few bars may be slow for other reasons than its size. ``expected``: all bars
        around, of which ``bars`` are a part."""
        if self.most_bars is None or len(bars) <= self.most_bars:
            return [request]
        plan = partial(plan_requests, self._timeframe, bars, expected=expected, within=request.window)
        return min(plan(self._limits, most_bars=self.most_bars), plan(HistoryLimits.CLASSIC), key=len)
