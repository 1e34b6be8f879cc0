"""What time it is for bars: the earlier of this machine's clock and the gateway's, unless the gateway's own bars disprove
its clock.

No clock is read here: the driver reports with each answer how far the gateway's is behind.
"""

from __future__ import annotations

from math import ceil

from ktrdr_pipelines.calendars import ExpectedBars
from ktrdr_pipelines.domain.arrays import IntArray
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import TransientError
from ktrdr_pipelines.loading.report import LoadReport

CLOCK_GRACE_S = 300
"""A load fails for bars that the gateway's clock holds back for longer than this."""


class GatewayClock:
    """The time by which one load judges what is complete."""

    def __init__(self, timeframe: Timeframe, own_now_s: int, report: LoadReport) -> None:
        """``own_now_s``: this machine's time, epoch seconds. A clock that is behind or wrong becomes a notice of ``report``."""
        self._timeframe, self._own_now_s, self._report = timeframe, own_now_s, report
        self.lag_s = 0.0
        """How far the gateway's clock is behind this machine's; never negative."""
        self._is_behind = self._is_disproved = False

    @property
    def now_s(self) -> int:
        """The earlier of this machine's time and the gateway's, epoch seconds: what is complete here may still be forming
        there."""
        return self._own_now_s - (0 if self._is_disproved else ceil(self.lag_s))

    def find_held_back(self, missing: ExpectedBars) -> TransientError | None:
        """The error when ``missing`` bars closed more than `CLOCK_GRACE_S` ago and are forming by the gateway's clock only."""
        closes = missing.closes
        held_back = int(((closes > self.now_s) & (closes <= self._own_now_s - CLOCK_GRACE_S)).sum())
        if not held_back or not self._is_behind:
            return None
        return TransientError(
            f"the gateway's clock is {self._own_now_s - self.now_s} s behind this machine's: {held_back} bars that are complete "
            "by this one's may still be forming there, and were left out",
            advice="Set the clock that is wrong, here or where the gateway runs, and run the load again.",
        )

    def check(self, opens_s: IntArray) -> None:
        """Compare the gateway's clock with the bars it just sent: bars that open after its own time disprove it."""
        lag_s = self._own_now_s - self.now_s
        if not lag_s:
            return
        # A daily bar may begin on the evening before its date, a longer one may carry its last day.
        slack_s = 0 if self._timeframe.is_intraday else self._timeframe.seconds + 86400
        if len(opens_s) and opens_s.max() - slack_s > self.now_s:
            self._is_disproved = True
            self._report.notices.append(
                f"the gateway's clock is {lag_s} s behind this machine's, and it sends bars that open later than that: "
                "its clock is ignored"
            )
        elif not self._is_behind:
            self._is_behind = True
            self._report.notices.append(
                f"the gateway's clock is {lag_s} s behind this machine's: bars count as complete by the gateway's"
            )
