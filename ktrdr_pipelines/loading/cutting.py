"""One answer cut to the bars that may be stored: those of the request's window that are complete. Pure."""

from __future__ import annotations

import numpy as np

from ktrdr_pipelines.bars.alignment import refuse_ambiguous_labels
from ktrdr_pipelines.bars.answer import Answer, NormalisedAnswer, normalise_answer
from ktrdr_pipelines.bars.schema import latest_closes
from ktrdr_pipelines.calendars import ExpectedBars, period_keys
from ktrdr_pipelines.domain.arrays import IntArray
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.loading.context import LoadContext
from ktrdr_pipelines.planning.coverage import bars_inside
from ktrdr_pipelines.planning.requests import Request


def cut_answer(load: LoadContext, raw: Answer, request: Request) -> NormalisedAnswer:
    """The bars of ``raw`` that open in the window of ``request`` and are complete by the clock of ``load``.

    A request that ends inside a bar brings that bar cut off at its end: only what closed by then is complete.

    Raises:
        DataError: labels that fit two periods, two different bars with one stamp.
    """
    series, end_s = load.series, request.end.timestamp()
    until_s = min(load.clock.now_s, end_s) if series.timeframe.is_intraday else load.clock.now_s
    refuse_ambiguous_labels(raw.opens_s, series, end_s=end_s, round_the_clock=load.all_expected.sessions_per_week > 5)
    return normalise_answer(
        raw,
        series,
        _widen_to_periods(series.timeframe, request.window, load.expected),
        now_s=until_s,
        closes_s=_closes_of(series.timeframe, raw.opens_s, load.all_expected),
    )


def _closes_of(timeframe: Timeframe, opens_s: IntArray, all_expected: ExpectedBars) -> IntArray:
    """When each bar is complete: by the calendar where it has the bar, else at the latest possible time."""
    latest = latest_closes(timeframe, opens_s)
    if not len(all_expected):
        return latest
    # A week or month may be labelled with any of its days.
    known, wanted = (period_keys(timeframe, stamps) for stamps in (all_expected.opens, opens_s))
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[at] == wanted, all_expected.closes[at], latest)


def _widen_to_periods(timeframe: Timeframe, window: Window, expected: ExpectedBars) -> Window:
    """``window`` as bars are cut to it: for weeks and months it contains every label that one of its bars may carry."""
    inside = bars_inside(expected, window)
    if timeframe.seconds <= 86400 or not len(inside):
        return window
    days = np.arange(window.start_s // 86400 - 31, window.end_s // 86400 + 32, dtype=np.int64) * 86400
    labels = days[np.isin(period_keys(timeframe, days), period_keys(timeframe, inside.opens))]
    return Window.from_epoch(int(labels[0]), int(labels[-1]) + 86400)
