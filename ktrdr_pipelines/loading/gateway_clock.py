"""What time it is for bars: the earlier of this machine's clock and the gateway's, unless its own bars disprove that one."""

from __future__ import annotations

from math import ceil

from ktrdr_pipelines.bars.answer import IntArray
from ktrdr_pipelines.calendars import ExpectedBars
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.errors import TransientError
from ktrdr_pipelines.loading.history_source import History
from ktrdr_pipelines.loading.report import LoadReport

CLOCK_GRACE_S = 300
"""Bars that are held back for longer by the gateway's clock make a load fail for them."""


class GatewayClock:
    """The time by which one load judges what is complete."""

    def __init__(self, series: Series, history: History, own_now_s: int, report: LoadReport) -> None:
        """``own_now_s``: this machine's time, epoch seconds. What is wrong with the gateway's is told in ``report``."""
        self._timeframe, self._history, self._own_now_s, self._report = series.timeframe, history, own_now_s, report
        self._is_told = self._is_disproved = False

    @property
    def now_s(self) -> int:
        """The earlier of this machine's time and the gateway's, epoch seconds: what is complete for us may still be forming
        there. Bars that open after the gateway's own time disprove its clock."""
        return self._own_now_s - (0 if self._is_disproved else ceil(self._history.clock_lag_s))

    def find_held_back(self, missing: ExpectedBars) -> TransientError | None:
        """What is to be said when ``missing`` bars closed more than `CLOCK_GRACE_S` ago and form by the gateway's clock only."""
        closes = missing.closes
        held_back = int(((closes > self.now_s) & (closes <= self._own_now_s - CLOCK_GRACE_S)).sum())
        if not held_back or not self._is_told:
            return None
        return TransientError(
            f"the gateway's clock is {self._own_now_s - self.now_s} s behind this machine's: {held_back} bars that are complete "
            "by this one's may still be forming there, and were left out",
            advice="Set the clock that is wrong, here or where the gateway runs, and run the load again.",
        )

    def doubt(self, opens_s: IntArray) -> None:
        """See whether the gateway's clock agrees with the bars it just sent, and tell when it is behind or wrong."""
        lag_s = self._own_now_s - self.now_s
        if not lag_s:
            return
        timeframe = self._timeframe
        # A daily bar may begin on the evening before its date, a longer one may carry its last day.
        slack_s = 0 if timeframe.is_intraday else timeframe.seconds + 86400
        if len(opens_s) and opens_s.max() - slack_s > self.now_s:
            self._is_disproved = True
            self._report.notices.append(
                f"the gateway's clock is {lag_s} s behind this machine's, and it sends bars that open later than that: "
                "its clock is not believed"
            )
        elif not self._is_told:
            self._is_told = True
            self._report.notices.append(
                f"the gateway's clock is {lag_s} s behind this machine's: bars count as complete by the gateway's"
            )
