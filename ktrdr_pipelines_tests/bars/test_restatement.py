"""One price scale per file: a split stops a load, adjusted bars are replaced together, continuous futures end now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from ktrdr_pipelines.bars.restatement import ScaleChanged
from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Hours, Instrument, Series, stock
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.errors import DataError, PermanentError
from ktrdr_pipelines.ib.client import RawBars
from ktrdr_pipelines.planning.durations import is_allowed
from ktrdr_pipelines.planning.modes import Held, resolve_window
from ktrdr_pipelines.planning.open_ended import plan_to_now, reach_from_now
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import FakeHistory, pick, utc, window
from ktrdr_pipelines_tests.loading.test_load import load

AAPL_1H = Series(stock("AAPL"), TIMEFRAMES["1h"])
ADJUSTED = Series(replace(stock("AAPL"), what_to_show="ADJUSTED_LAST"), TIMEFRAMES["1d"])
CONTINUOUS = Series(Instrument("ES", "CONTFUT", "CME", "USD", hours=Hours.EXTENDED), TIMEFRAMES["1h"])
NOW = utc("2024-06-15")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data")


def times(factor: float) -> Callable[[RawBars], RawBars]:
    """Every price by ``factor``, rounded as prices are."""

    def change(raw: RawBars) -> RawBars:
        return replace(raw, **{n: np.round(getattr(raw, n) * factor, 2) for n in ("open", "high", "low", "close")})

    return change


def always(fault: Callable[[RawBars], RawBars]) -> dict[int, Callable[[RawBars], RawBars]]:
    return dict.fromkeys(range(1, 50), fault)


# -- splits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.25, 1 / 3, 2 / 3, 0.95, 10.0])
def test_a_split_stops_the_tail_before_anything_is_written(store: Store, factor: float) -> None:
    """IB sends the last held bar with all prices changed by one ratio: an error with advice, and the file is unchanged."""
    load(
        store, FakeHistory.of(AAPL_1H, window("2024-03-01", "2024-04-01")), AAPL_1H, window("2024-03-01", "2024-04-01")
    )
    before = store.csv_path(AAPL_1H).read_bytes()
    split = FakeHistory.of(AAPL_1H, window("2024-03-01", "2024-06-01"), script=always(times(factor)))
    job, _ = load(store, split, AAPL_1H, window("2024-03-28T19:00", "2024-06-01"), recheck_last=True)
    assert store.csv_path(AAPL_1H).read_bytes() == before
    (failure,) = job.report.failures
    assert isinstance(failure.error, ScaleChanged)
    assert len(split.requests) == 1
    for part in ("split", "AAPL_1h.csv", "AAPL_1h.meta.json", "--mode full", "2024-03-28T19:00:00Z"):
        assert part in str(failure.error)


@pytest.mark.parametrize(
    "gap", [("2024-02-05", "2024-03-01"), ("2024-04-01", "2024-04-20")], ids=["older bars", "newer bars"]
)
@pytest.mark.parametrize("days_later", [0, 30])
def test_a_split_is_seen_by_loads_that_ask_for_other_bars(store: Store, gap: tuple[str, str], days_later: int) -> None:
    """Backfill, full, a chosen window: a held bar next to the gap is requested with it, and the price scales are not mixed."""
    load(
        store, FakeHistory.of(AAPL_1H, window("2024-03-01", "2024-04-01")), AAPL_1H, window("2024-03-01", "2024-04-01")
    )
    before = store.csv_path(AAPL_1H).read_bytes()
    everything = window("2024-01-01", "2024-06-01")
    exact = FakeHistory.of(AAPL_1H, everything, script=always(times(0.5)))
    exact.reaches_back_s = 0
    job, _ = load(store, exact, AAPL_1H, window(*gap), now=NOW + timedelta(days=days_later))
    assert [type(failure.error) for failure in job.report.failures] == [ScaleChanged]
    assert store.csv_path(AAPL_1H).read_bytes() == before


def test_the_held_bar_to_compare_with_costs_no_request_in_a_fresh_file(store: Store) -> None:
    """One longest request stays one; after a day without a write the comparison costs a second request."""
    span = window("2024-03-01", "2024-04-01")
    longest = window("2024-01-31", "2024-03-01")
    counts = []
    for number, later in enumerate((timedelta(), timedelta(days=2))):
        mine = Store(store.data_dir / str(number))
        load(mine, FakeHistory.of(AAPL_1H, span), AAPL_1H, span)
        history = FakeHistory.of(AAPL_1H, window("2024-01-01", "2024-06-01"))
        job, _ = load(mine, history, AAPL_1H, longest, now=NOW + later)
        assert job.report.status == "success"
        assert job.report.unexpected_bars == 0
        counts.append(len(history.requests))
    assert counts == [1, 2]


def test_a_revised_bar_is_no_split(store: Store) -> None:
    """A corrected close and high, however different, are written and counted as revised."""
    span = window("2024-03-01", "2024-04-01")
    load(store, FakeHistory.of(AAPL_1H, span), AAPL_1H, span)

    def revise(raw: RawBars) -> RawBars:
        return replace(raw, close=raw.close + 20.0, high=raw.high + 30.0)

    history = FakeHistory.of(AAPL_1H, window("2024-03-01", "2024-06-01"), script=always(revise))
    job, _ = load(store, history, AAPL_1H, window("2024-03-28T19:00", "2024-04-06"), recheck_last=True)
    assert job.report.status == "success"
    assert job.report.revised_bars == 1


@pytest.mark.parametrize("recheck_last", [True, False], ids=["tail", "full"])
@pytest.mark.parametrize("name", ["1m", "1h"])
@pytest.mark.parametrize(
    ("instrument", "factor"),
    [
        (
            Instrument("AAPL", "CFD", "SMART", "USD", what_to_show="MIDPOINT", hours=Hours.EXTENDED, calendar="NYSE"),
            0.25,
        ),
        (stock("AAPL"), 0.25),
        (Instrument("ES", "CONTFUT", "CME", "USD", hours=Hours.EXTENDED), 0.25),
        (Instrument("ES", "CONTFUT", "CME", "USD", hours=Hours.EXTENDED), 1.008),
    ],
    ids=["CFD", "STK", "CONTFUT", "CONTFUT that rolls"],
)
def test_whatever_is_restated_is_never_joined(
    store: Store, instrument: Instrument, factor: float, name: str, recheck_last: bool
) -> None:
    """A session is missing, and IB sends all history on another price scale; the answer reaches no further than requested."""
    series, friday, tuesday = Series(instrument, TIMEFRAMES[name]), utc("2024-06-07T22:30"), utc("2024-06-11T22:30")
    span = window("2024-06-03", "2024-06-07T22:30")
    load(store, FakeHistory.of(series, span), series, span, now=friday)
    before = store.csv_path(series).read_bytes()
    restated = FakeHistory.of(series, window("2024-06-03", "2024-06-11T22:30"), script=always(times(factor)))
    restated.reaches_back_s = 0
    job, _ = load(
        store, restated, series, window("2024-06-03", "2024-06-11T22:30"), now=tuesday, recheck_last=recheck_last
    )
    assert [type(failure.error) for failure in job.report.failures] == [ScaleChanged]
    assert store.csv_path(series).read_bytes() == before


# -- adjusted prices ------------------------------------------------------------------------------------------------------


def test_adjusted_bars_are_all_replaced_when_one_is_new(store: Store) -> None:
    """After a dividend the next load asks for the whole held range and replaces every bar."""
    load(store, FakeHistory.of(ADJUSTED, window("2024-01-01", "2024-05-01")), ADJUSTED, window("2024-01-01", "2024-05-01"),
         now=utc("2024-05-01"))  # fmt: skip
    before = store.read_bars(ADJUSTED)
    history = FakeHistory.of(ADJUSTED, window("2024-01-01", "2024-06-15"), script=always(times(0.99)))
    job, _ = load(store, history, ADJUSTED, window("2024-04-30", "2024-06-15"), recheck_last=True)
    after = store.read_bars(ADJUSTED)
    assert opens_of(after).tolist() == expected_bars(ADJUSTED, window("2024-01-01", "2024-06-15")).opens.tolist()
    assert np.allclose(after["close"][: len(before)], np.round(before["close"] * 0.99, 2))
    assert len(history.requests) == 1
    assert (job.report.status, job.report.revised_bars) == ("success", len(before))
    assert any("restated" in notice for notice in job.report.notices)


@pytest.mark.parametrize("mode", ["cut", "gap"])
def test_an_adjusted_file_stays_without_a_complete_answer(store: Store, mode: str) -> None:
    """An answer without some held bars replaces nothing, however often it is requested: the file is unchanged."""
    span = window("2024-01-01", "2024-05-01")
    load(store, FakeHistory.of(ADJUSTED, span), ADJUSTED, span, now=utc("2024-05-01"))
    before = store.csv_path(ADJUSTED).read_bytes()

    def damage(raw: RawBars) -> RawBars:
        return times(0.99)(pick(raw, slice(20, None) if mode == "cut" else np.r_[0:30, 33 : len(raw)]))

    history = FakeHistory.of(ADJUSTED, window("2024-01-01", "2024-06-15"), script=always(damage))
    job, _ = load(store, history, ADJUSTED, window("2024-04-30", "2024-06-15"), recheck_last=True)
    assert store.csv_path(ADJUSTED).read_bytes() == before
    (failure,) = job.report.failures
    assert isinstance(failure.error, DataError)
    assert "held bars" in str(failure.error)


def test_an_adjusted_answer_with_a_gap_is_completed_before_it_is_written(store: Store) -> None:
    """The second answer, of another length, fills the first; bars that were restated in between are not joined."""
    span = window("2024-01-01", "2024-06-15")
    gap = lambda raw: pick(raw, np.r_[0:30, 33 : len(raw)])  # noqa: E731
    history = FakeHistory.of(ADJUSTED, span, script={1: gap})
    load(store, history, ADJUSTED, span)
    assert opens_of(store.read_bars(ADJUSTED)).tolist() == expected_bars(ADJUSTED, span).opens.tolist()
    assert len({str(request.duration) for request in history.requests}) == len(history.requests) == 2
    other = Store(store.data_dir / "restated")
    later = lambda raw: times(0.9)(pick(raw, np.r_[0:60, 63 : len(raw)]))  # noqa: E731
    history = FakeHistory.of(ADJUSTED, span, script={1: gap, 2: later, 3: times(0.9)})
    load(other, history, ADJUSTED, span)
    assert np.allclose(other.read_bars(ADJUSTED)["close"], np.round(store.read_bars(ADJUSTED)["close"] * 0.9, 2))


def test_adjusted_bars_that_one_request_cannot_reach_keep_the_old_file(store: Store) -> None:
    """No request is sent, the error has the reason, the file is unchanged."""
    hourly = Series(ADJUSTED.instrument, TIMEFRAMES["1h"])
    span = window("2022-01-03", "2022-02-01")
    load(store, FakeHistory.of(hourly, span), hourly, span, now=utc("2022-02-01"))
    before = store.csv_path(hourly).read_bytes()
    history = FakeHistory.of(hourly, window("2022-01-01", "2024-06-15"))
    job, _ = load(store, history, hourly, window("2022-01-31", "2024-06-15"), recheck_last=True)
    assert history.requests == []
    assert store.csv_path(hourly).read_bytes() == before
    (failure,) = job.report.failures
    assert isinstance(failure.error, PermanentError)
    assert "one request" in str(failure.error)


def test_a_whole_write_refuses_to_leave_a_held_bar(store: Store) -> None:
    """Even if another process added bars between the request and the write."""
    span = window("2024-01-01", "2024-05-01")
    load(store, FakeHistory.of(ADJUSTED, span), ADJUSTED, span, now=utc("2024-05-01"))
    bars = store.read_bars(ADJUSTED)
    for part in (bars.iloc[1:], bars.iloc[:-1], bars.drop(index=[5])):
        with pytest.raises(DataError, match="not among the new ones"):
            store.write(ADJUSTED, part.reset_index(drop=True), answered=None, source="paper", now=NOW, whole=True)
    assert len(store.read_bars(ADJUSTED)) == len(bars)


# -- continuous futures ---------------------------------------------------------------------------------------------------


def test_a_continuous_future_is_one_request_as_far_back_as_the_limits_reach(store: Store) -> None:
    """The window of a first load fits into one request under the limits in force, and a second day is reached by the next."""
    for limits, at_least_days in ((HistoryLimits.CLASSIC, 28), (HistoryLimits.CURRENT, 300)):
        mine = Store(store.data_dir / limits.value)
        reach = reach_from_now(CONTINUOUS, limits, int(NOW.timestamp()))
        assert (NOW - reach.start).days >= at_least_days
        history = FakeHistory.of(CONTINUOUS, window("2022-01-03", "2024-06-15"))
        job, _ = load(mine, history, CONTINUOUS, reach, limits=limits)
        (request,) = history.requests
        assert job.report.status == "success"
        assert request.end == NOW
        assert opens_of(mine.read_bars(CONTINUOUS)).tolist() == expected_bars(CONTINUOUS, reach).opens.tolist()
    assert Held.of(mine.extent(CONTINUOUS), mine.read_sidecar(CONTINUOUS)) is not None


@pytest.mark.parametrize("name", ["1h", "5m", "1d"])
@pytest.mark.parametrize("series", [CONTINUOUS, ADJUSTED], ids=["CONTFUT", "ADJUSTED_LAST"])
def test_at_every_hour_of_a_week_one_request_brings_what_it_can_reach(series: Series, name: str) -> None:
    """Also when the market has been closed for a while, and the oldest bars lie further from now than from the last bar."""
    mine = Series(series.instrument, TIMEFRAMES[name])
    for hours in range(0, 168, 3):
        now = utc("2024-06-10") + timedelta(hours=hours)
        wanted = expected_bars(mine, Window(utc("2022-01-03"), now), complete_at_s=int(now.timestamp()))
        planned = plan_to_now(mine, wanted, HistoryLimits.CLASSIC, int(now.timestamp()))
        assert planned.request is not None
        assert is_allowed(mine.timeframe, planned.request.duration, HistoryLimits.CURRENT)
        brought = wanted.opens[len(planned.unreachable) :]
        assert planned.request.window.start_s <= brought[0]
        assert len(brought) > 20


def test_the_history_of_a_continuous_future_grows_by_its_tail(store: Store) -> None:
    """The tail asks from the last held bar up to now, in one request, also after longer than the classic limit."""
    reach = reach_from_now(CONTINUOUS, HistoryLimits.CLASSIC, int(NOW.timestamp()))
    load(store, FakeHistory.of(CONTINUOUS, window("2024-01-01", "2024-06-15")), CONTINUOUS, reach)
    for later in (utc("2024-06-18"), utc("2024-09-02")):
        held = Held.of(store.extent(CONTINUOUS), store.read_sidecar(CONTINUOUS))
        span = resolve_window(LoadRequest("ES", CONTINUOUS.timeframe, Mode.TAIL), held, until=later)
        history = FakeHistory.of(CONTINUOUS, window("2024-01-01", "2024-12-31"))
        history.truth = history.truth[history.truth < later.timestamp()]
        job, _ = load(store, history, CONTINUOUS, span, now=later, recheck_last=True)
        assert (len(history.requests), job.report.status) == (1, "success")
    everything = expected_bars(CONTINUOUS, window("2024-01-01", "2024-09-02")).opens
    held_s = opens_of(store.read_bars(CONTINUOUS)).tolist()
    assert held_s == [s for s in everything.tolist() if s >= held_s[0]]


def test_a_gap_of_a_continuous_future_is_requested_again_with_another_duration(store: Store) -> None:
    """An end date is never sent, so only the duration can differ; two answers confirm that the bars are absent."""
    span = window("2024-06-03", "2024-06-15")
    history = FakeHistory.of(CONTINUOUS, span)
    history.truth = np.delete(history.truth, [40, 41])
    job, _ = load(store, history, CONTINUOUS, span)
    assert {request.end for request in history.requests} == {NOW}
    assert len({str(request.duration) for request in history.requests}) == len(history.requests) == 2
    assert (job.report.status, job.report.proven_empty) == ("success", 2)


def test_a_roll_that_restates_a_continuous_future_is_noticed(store: Store) -> None:
    """All held bars are a little higher in IB's answer: the file is unchanged."""
    span = window("2024-06-03", "2024-06-13")
    load(store, FakeHistory.of(CONTINUOUS, span), CONTINUOUS, span, now=utc("2024-06-13"))
    before = store.csv_path(CONTINUOUS).read_bytes()
    history = FakeHistory.of(CONTINUOUS, window("2024-06-03", "2024-06-15"), script=always(times(1.008)))
    job, _ = load(store, history, CONTINUOUS, window("2024-06-12T20:00", "2024-06-15"), recheck_last=True)
    assert store.csv_path(CONTINUOUS).read_bytes() == before
    assert "roll" in str(job.report.failures[0].error)


@pytest.mark.parametrize("offset", [2.75, 0.03, -0.01])
def test_a_roll_of_any_size_is_noticed(store: Store, offset: float) -> None:
    """Contracts of a flat curve lie close together: every bar has moved by the same amount, however small."""
    span = window("2024-06-03", "2024-06-13")
    load(store, FakeHistory.of(CONTINUOUS, span), CONTINUOUS, span, now=utc("2024-06-13"))
    before = store.csv_path(CONTINUOUS).read_bytes()

    def move(raw: RawBars) -> RawBars:
        return replace(raw, **{n: np.round(getattr(raw, n) + offset, 2) for n in ("open", "high", "low", "close")})

    history = FakeHistory.of(CONTINUOUS, window("2024-06-03", "2024-06-15"), script=always(move))
    job, _ = load(store, history, CONTINUOUS, window("2024-06-12T20:00", "2024-06-15"), recheck_last=True)
    assert store.csv_path(CONTINUOUS).read_bytes() == before
    assert f"by about {offset:+g}" in str(job.report.failures[0].error)


def test_a_revised_bar_of_a_continuous_future_is_no_roll(store: Store) -> None:
    """A settlement price that is corrected, in the last bar alone."""
    span = window("2024-06-03", "2024-06-13")
    load(store, FakeHistory.of(CONTINUOUS, span), CONTINUOUS, span, now=utc("2024-06-13"))

    def revise(raw: RawBars) -> RawBars:
        close = raw.close.copy()
        close[raw.opens_s < utc("2024-06-13").timestamp()] += 0.01
        return replace(raw, close=close, high=np.maximum(raw.high, close))

    history = FakeHistory.of(CONTINUOUS, window("2024-06-03", "2024-06-15"), script=always(revise))
    job, _ = load(store, history, CONTINUOUS, window("2024-06-12T20:00", "2024-06-15"), recheck_last=True)
    assert job.report.status == "success"
    assert job.report.revised_bars > 0


def test_a_window_before_the_reach_of_a_continuous_future_fails_and_is_not_absent(store: Store) -> None:
    """An old window is refused with a reason; no request is sent, and no bar is recorded as absent."""
    history = FakeHistory.of(CONTINUOUS, window("2020-01-01", "2024-06-15"))
    job, _ = load(store, history, CONTINUOUS, window("2020-01-01", "2020-02-01"))
    assert (history.requests, job.report.proven_empty, job.report.status) == ([], 0, "failed")
    assert "up to now" in str(job.report.failures[0].error)
