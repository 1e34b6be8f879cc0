"""The sizes of requests under limits that allow slow answers: smaller after slow ones, halved after a time-out."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.calls import Call
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.errors import RequestTimeout
from ktrdr_pipelines.loading.report import Fetched
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.loading.sizes import GOOD_ANSWER_S, RequestSizes
from ktrdr_pipelines.planning.requests import Request, plan_requests
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import FakeHistory, run_load, utc, window

AAPL = Series(stock("AAPL"), TIMEFRAMES["1m"])
SPAN = window("2024-01-01", "2024-03-01")


class SlowHistory(FakeHistory):
    """Does not answer requests whose answer would have more than ``most`` bars."""

    most = 3000

    def fetch(self, series: Series, request: Request, call: Call | None = None) -> Any:
        answer = super().fetch(series, request, call)
        if len(answer.opens_s) > self.most:
            raise RequestTimeout("no answer within 120 s")
        return answer


def test_a_request_that_is_not_answered_in_time_is_asked_for_in_halves(tmp_path: Path) -> None:
    """Two months of minutes in two requests, too long for this gateway: all bars arrive, and nothing has failed."""
    store, history = Store(tmp_path), SlowHistory(expected_bars(AAPL, SPAN).opens)
    load = Load(
        AAPL, SPAN, store=store, history=lambda: history, limits=HistoryLimits.CURRENT, now=lambda: utc("2024-06-15")
    )
    events = list(run_load(load))
    assert load.report.requests_planned == 2
    assert (load.report.status, load.report.failures, load.report.missing_bars) == ("success", [], 0)
    assert opens_of(store.read_bars(AAPL)).tolist() == history.truth.tolist()
    done = [event for event in events if isinstance(event, Fetched)]
    assert done[-1].done == done[-1].planned
    assert len(history.requests) <= 12


def test_classic_requests_are_not_made_smaller(tmp_path: Path) -> None:
    """The gateway has no excuse for them: they fail, after the retries of the history."""
    history = SlowHistory(expected_bars(AAPL, SPAN).opens)
    history.most = 10
    span = window("2024-01-02", "2024-01-04")
    load = Load(
        AAPL,
        span,
        store=Store(tmp_path),
        history=lambda: history,
        limits=HistoryLimits.CLASSIC,
        now=lambda: utc("2024-06-15"),
    )
    list(run_load(load))
    assert len(history.requests) == load.report.requests_planned == len(load.report.failures) == 2


def test_slow_answers_make_later_requests_smaller() -> None:
    """In proportion to the time that they took; a fast answer changes nothing, and sizes never grow."""
    bars = expected_bars(AAPL, SPAN)
    (first, *_) = plan_requests(AAPL.timeframe, bars, HistoryLimits.CURRENT)
    sizes = RequestSizes(AAPL.timeframe, HistoryLimits.CURRENT)
    assert not sizes.note_answer(8000, GOOD_ANSWER_S)
    assert sizes.note_answer(8000, 2 * GOOD_ANSWER_S)
    assert sizes.most_bars == 4000
    mine = bars.take(bars.opens < first.window.end_s)
    parts = sizes.divide(first, mine, bars)
    assert len(parts) == -(-len(mine) // 4000)
    assert all(before.window.end <= after.window.start for before, after in pairwise(parts))
    assert not sizes.note_answer(8000, 1.5 * GOOD_ANSWER_S)
    sizes.note_time_out(4000)
    assert sizes.most_bars == 2000


@pytest.mark.parametrize("limits", list(HistoryLimits))
def test_what_one_classic_request_covers_stays_whole(limits: HistoryLimits) -> None:
    day = expected_bars(AAPL, window("2024-01-02", "2024-01-03"))
    assert not RequestSizes(AAPL.timeframe, limits).may_shrink(day)
