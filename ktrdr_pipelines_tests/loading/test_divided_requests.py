"""Requests that are divided: what the planned one was for beside its missing bars is asked for all the same, in few parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.calls import Call
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.errors import RequestTimeout
from ktrdr_pipelines.ib.client import RawBars
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.loading.sizes import GOOD_ANSWER_S, RequestSizes
from ktrdr_pipelines.planning.requests import Request, plan_requests
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import FakeHistory, run_load, utc, window

AAPL = Series(stock("AAPL"), TIMEFRAMES["1m"])


def halved(raw: RawBars) -> RawBars:
    return replace(raw, **{name: getattr(raw, name) / 2 for name in ("open", "high", "low", "close")})


class SplitSlowHistory(FakeHistory):
    """After a split, all prices are half of what they were. Long answers do not come."""

    is_split = False
    most = 100_000
    reaches_back_s = 0

    def fetch(self, series: Series, request: Request, call: Call | None = None) -> Any:
        answer = super().fetch(series, request, call)
        # Exactly the window: an answer need not reach further back.
        keep = answer.opens_s >= request.window.start_s
        answer = RawBars(*(getattr(answer, n)[keep] for n in ("opens_s", "open", "high", "low", "close", "volume")))
        if len(answer.opens_s) > self.most:
            raise RequestTimeout("no answer within 120 s")
        return halved(answer) if self.is_split else answer


def load(store: Store, history: FakeHistory, start: str, end: str, now: str, **more: Any) -> Load:
    made = Load(
        AAPL,
        window(start, end),
        store=store,
        history=lambda: history,
        limits=HistoryLimits.CURRENT,
        now=lambda: utc(now),
        **more,
    )
    list(run_load(made))
    return made


@pytest.mark.parametrize("recheck_last", [True, False])
def test_a_split_is_noticed_when_the_request_that_compares_is_divided(tmp_path: Path, recheck_last: bool) -> None:
    store = Store(tmp_path)
    history = SplitSlowHistory(expected_bars(AAPL, window("2024-01-02", "2024-04-01")).opens)
    load(store, history, "2024-01-02", "2024-01-13", "2024-01-13T12:00")
    held = store.read_bars(AAPL)
    assert len(held)
    history.is_split, history.most = True, 4000
    second = load(store, history, "2024-01-02", "2024-02-10", "2024-02-15", recheck_last=recheck_last)
    assert [type(f.error).__name__ for f in second.report.failures] == ["ScaleChanged"]
    assert opens_of(store.read_bars(AAPL)).tolist() == opens_of(held).tolist()


@pytest.mark.parametrize("bars", [0, 1, 390])
def test_a_slow_answer_of_few_bars_does_not_make_requests_smaller_than_the_classic_ones(bars: int) -> None:
    missing = expected_bars(AAPL, window("2024-01-02", "2024-02-02"))
    (request,) = plan_requests(AAPL.timeframe, missing, HistoryLimits.CURRENT)
    sizes = RequestSizes(AAPL.timeframe, HistoryLimits.CURRENT)
    sizes.note_answer(bars, 3 * GOOD_ANSWER_S)
    parts = sizes.divide(request, missing, missing)
    classic = plan_requests(AAPL.timeframe, missing, HistoryLimits.CLASSIC)
    assert len(parts) <= len(classic)
    covered = np.zeros(len(missing), np.bool_)
    for part in parts:
        covered |= (missing.opens >= part.window.start_s) & (missing.opens < part.window.end_s)
    assert covered.all()
