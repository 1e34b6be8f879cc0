"""What a load asks for: the missing bars of its window as the fewest requests, with the bars to compare with. Pure.

Which bars are missing is judged in `planning/coverage.py`, how far a request reaches in `planning/requests.py`. Here is what
only a load decides: the last held bar is asked for again, a held bar shows whether the file is on IB's price scale, and a
series that IB serves only up to now is one request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from ktrdr_pipelines.bars.restatement import BARS_TO_SHOW_A_ROLL, RESTATED_KINDS, list_anchors
from ktrdr_pipelines.calendars import ExpectedBars, expected_bars, match_held
from ktrdr_pipelines.domain.arrays import BoolArray
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.partitions import Partition, partitions_in
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.domain.timeframes import HistoryLimits
from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.errors import KtrdrError, PermanentError
from ktrdr_pipelines.loading.knowledge import Knowledge
from ktrdr_pipelines.planning.coverage import Gap, bars_inside, find_gaps, mark_missing, widen
from ktrdr_pipelines.planning.open_ended import plan_to_now
from ktrdr_pipelines.planning.requests import Request, plan_requests

SCALE_TRUSTED = timedelta(hours=18)
"""So long after the last write of a file its bars count as being on the price scale of IB's answers: splits come overnight."""

TAIL_REQUESTS, FEW_REQUESTS = 3, 10
"""So many planned requests at most are a tail, or the small work of a user who waits; more are a backfill."""


@dataclass(frozen=True, eq=False)
class LoadPlan:
    """What a load found missing and how it is going to ask for it.

    ``span`` are whole partitions: completeness is judged by them, even if less was asked for. ``expected`` are its bars that are
    complete, ``missing`` marks those that are neither held nor known to be absent; ``all_expected`` has the bars around it too,
    complete or not. ``unreachable``: a window that IB cannot serve, and why. ``anchor_s``: the held bar that is asked for
    again to compare price scales, epoch seconds.
    """

    span: Window
    partitions: Sequence[Partition]
    expected: ExpectedBars
    all_expected: ExpectedBars
    missing: BoolArray
    gaps: Sequence[Gap]
    requests: Sequence[Request]
    unreachable: tuple[Window, KtrdrError] | None = None
    anchor_s: int | None = None
    is_tail: bool = False
    """All that is missing lies after the last held bar."""

    @property
    def work(self) -> WorkClass:
        """The class of its requests: the end of a series, a few requests, or a backfill."""
        if self.is_tail and len(self.requests) <= TAIL_REQUESTS:
            return WorkClass.TAIL
        return WorkClass.INTERACTIVE if len(self.requests) <= FEW_REQUESTS else WorkClass.BACKFILL


def load_span(series: Series, window: Window) -> Window | None:
    """The partitions that ``window`` touches, as one window; None when it is empty."""
    partitions = list(partitions_in(series.timeframe, window))
    return Window(partitions[0].window.start, partitions[-1].window.end) if partitions else None


def plan_load(
    series: Series,
    window: Window,
    known: Knowledge,
    limits: HistoryLimits,
    *,
    now: datetime,
    recheck_last: bool = False,
) -> LoadPlan:
    """The plan for ``window`` (not empty). ``recheck_last``: if anything is asked at all, the last held bar is asked again.

    Raises:
        InputError: no calendar is known for the instrument.
    """
    return _Planner(series, window, known, limits, now, recheck_last).plan()


class _Planner:
    """The values that every step of the planning needs."""

    def __init__(
        self,
        series: Series,
        window: Window,
        known: Knowledge,
        limits: HistoryLimits,
        now: datetime,
        recheck_last: bool,
    ) -> None:
        self._series, self._window, self._known, self._limits = series, window, known, limits
        self._now, self._now_s, self._recheck_last = now, int(now.timestamp()), recheck_last
        self._partitions = list(partitions_in(series.timeframe, window))
        span = Window(self._partitions[0].window.start, self._partitions[-1].window.end)
        self._span = self._widen_to_all(span) if series.instrument.refreshes_whole else span
        # Bars that are not complete yet show what part of an answer is still forming; only complete ones are asked for.
        self._all_expected = expected_bars(series, widen(self._span))
        self._expected = expected_bars(series, self._span, complete_at_s=self._now_s)
        self._complete = self._all_expected.complete_at(self._now_s)

    def plan(self) -> LoadPlan:
        held = self._known.held
        missing = mark_missing(self._expected, held.opens, self._known.sidecar, held.first_s, self._series.timeframe)
        asked = bars_inside(self._expected.take(np.flatnonzero(missing)), self._window)
        unreachable, anchor_s = None, None
        if self._series.instrument.ends_now:
            requests, unreachable = self._plan_to_now(asked)
        else:
            requests, anchor_s = self._plan_with_anchor(asked)
        return LoadPlan(
            span=self._span,
            partitions=self._partitions,
            expected=self._expected,
            all_expected=self._all_expected,
            missing=missing,
            gaps=find_gaps(self._expected, asked),
            requests=requests,
            unreachable=unreachable,
            anchor_s=anchor_s,
            is_tail=held.last_s is not None and len(asked) > 0 and int(asked.opens[0]) > held.last_s,
        )

    def _widen_to_all(self, span: Window) -> Window:
        """``span`` and everything held: a series that is refreshed whole has no smaller part."""
        first_s = self._known.held.first_s
        first_s = span.start_s if first_s is None else min(span.start_s, first_s)
        return Window.from_epoch(first_s, max(span.end_s, self._now_s))

    def _with_last_held(self, asked: ExpectedBars) -> ExpectedBars:
        """``asked`` and the last held bar, when the load continues after it: a bar that was stored a moment too early, or revised
        since, would otherwise stay wrong."""
        last_s = self._known.held.last_s
        if not self._recheck_last or last_s is None or not len(asked) or asked.opens[0] < last_s:
            return asked
        wanted = np.isin(self._expected.opens, asked.opens) | (self._expected.opens == last_s)
        return self._expected.take(np.flatnonzero(wanted))

    def _plan_requests(self, bars: ExpectedBars, expected: ExpectedBars) -> list[Request]:
        within = Window(self._window.start, max(self._window.start, min(self._window.end, self._now)))
        return plan_requests(self._series.timeframe, bars, self._limits, expected=expected, within=within)

    def _plan_with_anchor(self, asked: ExpectedBars) -> tuple[list[Request], int | None]:
        """The fewest requests for ``asked``, with a held bar in the first of them that shows whether the file is still on the
        price scale of IB's answers. It may cost a request only where the file was not written for most of a day."""
        requests = self._plan_requests(self._with_last_held(asked), self._expected)
        held, last_s = self._known.held, self._known.held.last_s
        if self._series.instrument.sec_type not in RESTATED_KINDS or last_s is None or not len(asked):
            return requests, None
        if any(r.window.start_s <= last_s < r.window.end_s for r in requests[:1]):
            return requests, last_s  # it is asked for again anyway
        written_at = self._known.sidecar.updated_at
        is_old = written_at is not None and self._now - written_at > SCALE_TRUSTED
        found = []
        anchors = list_anchors(self._complete, asked, held.opens, self._series.timeframe)[:4]
        for anchor_s in self._complete.opens[anchors].tolist():
            wanted = self._complete.take(np.isin(self._complete.opens, [*asked.opens, anchor_s]))
            anchored = self._plan_requests(wanted, self._complete)
            found.append((len(anchored), anchor_s, anchored))
        if not found or (min(found)[0] > len(requests) and not is_old):
            return requests, None
        _, chosen_s, anchored = min(found, key=lambda each: each[0])
        at = datetime.fromtimestamp(chosen_s, UTC)
        return sorted(anchored, key=lambda request: not request.window.contains(at)), chosen_s

    def _plan_to_now(self, asked: ExpectedBars) -> tuple[list[Request], tuple[Window, KtrdrError] | None]:
        """One request for ``asked`` up to now, and what it cannot reach. Of a series that is refreshed whole it has to reach the
        first held bar, or nothing is asked for."""
        wanted, first_s = self._with_last_held(asked), self._known.held.first_s
        is_whole = self._series.instrument.refreshes_whole
        if len(asked) and is_whole:
            oldest_s = int(asked.opens[0]) if first_s is None else min(int(asked.opens[0]), first_s)
            wanted = self._expected.take(self._expected.opens >= oldest_s)
        if not len(wanted):
            return [], None
        compared = self._with_bars_to_compare(wanted)
        planned = plan_to_now(self._series, compared, self._limits, self._now_s)
        if len(planned.unreachable) and len(compared) > len(wanted):
            planned = plan_to_now(self._series, wanted, self._limits, self._now_s)
        requests = [] if planned.request is None else [planned.request]
        if not len(planned.unreachable):
            return requests, None
        lost = find_gaps(wanted, planned.unreachable)
        window = Window(lost[0].window.start, lost[-1].window.end)
        is_blocked = is_whole and first_s is not None and first_s < window.end_s
        return [] if is_blocked else requests, (
            window,
            self._explain_unreachable(window, planned.unreachable, is_blocked),
        )

    def _explain_unreachable(self, window: Window, unreachable: ExpectedBars, is_blocked: bool) -> PermanentError:
        kind = "adjusted prices" if self._series.instrument.refreshes_whole else "a continuous future"
        return PermanentError(
            f"IB serves {kind} only up to now, in a single request, which reaches back to "
            f"{format_instant(window.end)} at most: {len(unreachable)} older bars are beyond it",
            advice="Held bars and new ones do not go together, so the file was left as it is. Move it away to begin anew with "
            "what one request brings."
            if is_blocked
            else "Give a later --start.",
        )

    def _with_bars_to_compare(self, wanted: ExpectedBars) -> ExpectedBars:
        """``wanted`` and the held bars right before it, as many as have to agree that a continuous future was restated."""
        known = self._complete
        held = match_held(known, self._known.held.opens, self._series.timeframe)
        older = known.opens[held & (known.opens < wanted.opens[0])][-BARS_TO_SHOW_A_ROLL:]
        return known.take(np.isin(known.opens, [*wanted.opens, *older]))
