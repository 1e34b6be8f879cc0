"""Requests that are divided: what the planned one was for beside its missing bars is asked for too, in few parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.calls import Call
from ktrdr_pipelines.domain.instruments import Hours, Instrument, Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.errors import DataError, KtrdrError, RequestTimeout, TransientError
from ktrdr_pipelines.ib.wire.decoding import RawBars
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.loading.sizes import GOOD_ANSWER_S, RequestSizes
from ktrdr_pipelines.planning.durations import reach_back
from ktrdr_pipelines.planning.requests import Request, plan_requests
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import FakeHistory, raw_bars, run_load, utc, window

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


def load(store: Store, history: Any, start: str, end: str, now: str, **more: Any) -> Load:
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


class UpToNowHistory(SplitSlowHistory):
    """Serves a series up to now only, whatever the end of the request, as IB does. Long answers do not come."""

    now_s = int(utc("2024-03-20").timestamp())

    def fetch(self, series: Series, request: Request, call: Call | None = None) -> Any:
        self.requests.append(request)
        start_s = reach_back(self.now_s, request.duration)
        opens = self.truth[(self.truth >= start_s) & (self.truth < self.now_s)]
        if len(opens) > self.most:
            raise RequestTimeout("no answer within 120 s")
        return raw_bars(opens, no_data_text="" if len(opens) else "HMDS query returned no data")


@pytest.mark.parametrize(
    "instrument",
    [
        Instrument("ES", "CONTFUT", "CME", "USD", hours=Hours.EXTENDED),
        replace(stock("AAPL"), what_to_show="ADJUSTED_LAST"),
    ],
    ids=["CONTFUT", "adjusted"],
)
def test_a_request_up_to_now_is_never_divided(tmp_path: Path, instrument: Instrument) -> None:
    """Its parts would all be answered with the newest bars."""
    series, store = Series(instrument, TIMEFRAMES["1h"]), Store(tmp_path)
    span = window("2023-06-01", "2024-03-20")
    history: Any = UpToNowHistory(expected_bars(series, span).opens)
    history.most = 600
    made = Load(
        series, span, store=store, history=lambda: history, limits=HistoryLimits.CURRENT, now=lambda: utc("2024-03-20")
    )
    list(run_load(made))
    assert [type(f.error).__name__ for f in made.report.failures] == ["RequestTimeout"]
    assert len(history.requests) == 1
    assert store.read_sidecar(series).proven_empty == ()


@pytest.mark.parametrize("error", [TransientError("no answer"), DataError("bad bars")], ids=["transient", "data"])
def test_nothing_is_written_while_the_price_scale_is_unknown(tmp_path: Path, error: KtrdrError) -> None:
    """The request that compares price scales has failed: the others could be answered on another scale."""
    store = Store(tmp_path)
    history = SplitSlowHistory(expected_bars(AAPL, window("2024-01-02", "2024-04-01")).opens)
    load(store, history, "2024-01-02", "2024-01-13", "2024-01-13T12:00")
    held = store.read_bars(AAPL)
    history.is_split = True
    history.script[len(history.requests) + 1] = error
    second = load(store, history, "2024-01-02", "2024-03-20", "2024-03-21")
    assert second.report.requests_planned > 1
    assert [f.error for f in second.report.failures] == [error]
    assert opens_of(store.read_bars(AAPL)).tolist() == opens_of(held).tolist()
    assert second.report.missing_bars > 10_000
