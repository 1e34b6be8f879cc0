"""What all episodes of one load share: the series, what is expected, what is known, the clock, IB's head timestamp, the
report."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from ktrdr_pipelines.calendars import ExpectedBars
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.timeframes import HistoryLimits
from ktrdr_pipelines.loading.gateway_clock import GatewayClock
from ktrdr_pipelines.loading.knowledge import Knowledge
from ktrdr_pipelines.loading.report import LoadReport

SPARSE_AFTER = 3
"""So many windows in a row whose probes brought nothing new make a series sparse."""


@dataclass(eq=False)
class LoadContext:
    """Values of one load. ``expected`` bars are complete at ``own_now_s`` (epoch seconds, by this machine's clock);
    ``all_expected`` has the bars around them too that are not complete, which show what part of an answer is still forming."""

    series: Series
    limits: HistoryLimits
    own_now_s: int
    expected: ExpectedBars
    all_expected: ExpectedBars
    known: Knowledge
    clock: GatewayClock
    report: LoadReport
    head: datetime | None = None
    """IB's head timestamp; None when IB has none, or while it ``head_is_asked`` is false."""
    head_is_asked: bool = False
    head_asked_at: datetime | None = None
    agreed: int = 0
    """Windows in a row whose probes brought nothing new."""

    @property
    def head_s(self) -> int | None:
        """IB's head timestamp as far as it was asked for, epoch seconds (of daily and longer bars its day); None when there
        is none, or a held bar is older and disproves it."""
        if self.head is None:
            return None
        head_s = int(self.head.timestamp())
        if not self.series.timeframe.is_intraday:
            head_s -= head_s % 86400
        first_s = self.known.held.first_s
        return None if first_s is not None and first_s < head_s else head_s

    @property
    def is_sparse(self) -> bool:
        """True when probes keep agreeing that some bars of the series are absent (illiquid minutes without trades). Absent
        bars are then kept as answered windows, not as a range for each minute. Probes are still made: accepting an
        absence on one answer was tried, and a cut answer slipped through."""
        return self.known.sidecar.sparse or (self.agreed >= SPARSE_AFTER and self.series.timeframe.is_intraday)
