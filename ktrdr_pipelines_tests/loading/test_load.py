"""Promises of the use case: nothing lost, nothing doubled, nothing asked twice, no failure read as "no data"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.calls import Call
from ktrdr_pipelines.domain.instruments import Instrument, Series, forex, stock
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.errors import (
    DataError,
    GatewayUnreachable,
    PacingError,
    PermanentError,
    RequestTimeout,
    StoreError,
    TransientError,
)
from ktrdr_pipelines.ib.client import RawBars
from ktrdr_pipelines.loading.report import Completed, Event, Failure, Fetched, Planned
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.planning.modes import Held, resolve_window
from ktrdr_pipelines.planning.requests import Request
from ktrdr_pipelines.store.results import Written
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import FakeHistory, pick, raw_bars, run_load, utc, window

AAPL_1H = Series(stock("AAPL"), TIMEFRAMES["1h"])
AAPL_1D = Series(stock("AAPL"), TIMEFRAMES["1d"])
NOW = utc("2024-06-15")
VALUES = ("open", "high", "low", "close", "volume")


def load(
    store: Store,
    history: FakeHistory,
    series: Series,
    span: Window,
    *,
    now: datetime = NOW,
    limits: HistoryLimits = HistoryLimits.CLASSIC,
    recheck_last: bool = False,
) -> tuple[Load, list[Event]]:
    job = Load(
        series, span, store=store, history=lambda: history, limits=limits, now=lambda: now, recheck_last=recheck_last
    )
    return job, list(run_load(job))


def held(store: Store, series: Series) -> list[int]:
    return opens_of(store.read_bars(series)).tolist()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data")


def test_a_load_brings_every_expected_bar_and_a_second_one_asks_nothing(store: Store) -> None:
    """After a load every bar of the calendar is in the file, and loading again makes no request."""
    span = window("2024-01-01", "2024-03-01")
    history = FakeHistory.of(AAPL_1H, span)
    job, _ = load(store, history, AAPL_1H, span)
    assert held(store, AAPL_1H) == expected_bars(AAPL_1H, span).opens.tolist()
    assert job.report.status == "success"
    assert (job.report.fetched_bars, job.report.gaps_analyzed, job.report.ib_requests_made) == (287, 1, 2)
    again, events = load(store, history, AAPL_1H, span)
    assert len(history.requests) == 2
    assert (again.report.fetched_bars, again.report.gaps_analyzed, again.report.ib_requests_made) == (0, 0, 0)
    assert [e.partition.key for e in events if isinstance(e, Completed)] == ["2024-01-01", "2024-02-01"]


def test_prices_reach_the_file_unchanged(store: Store) -> None:
    """Each bar in the file has the prices and the volume that IB sent for its stamp."""
    span = window("2024-01-02", "2024-01-09")
    load(store, FakeHistory.of(AAPL_1H, span), AAPL_1H, span)
    bars = store.read_bars(AAPL_1H)
    sent = raw_bars(opens_of(bars))
    for name in ("open", "high", "low", "close", "volume"):
        assert bars[name].tolist() == getattr(sent, name).tolist()


def drop(lo: int, hi: int) -> Callable[[RawBars], RawBars]:
    return lambda raw: pick(raw, np.r_[0:lo, hi : len(raw)])


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(drop(40, 47), id="a hole of seven bars"),
        pytest.param(lambda raw: pick(raw, slice(0, len(raw) // 2)), id="the first half only"),
        pytest.param(lambda raw: pick(raw, slice(len(raw) // 2, None)), id="the second half only"),
        pytest.param(lambda raw: pick(raw, slice(0, 0)), id="an empty answer without a word"),
        pytest.param(lambda raw: raw_bars(raw.opens_s[:0], no_data_text="no data"), id="no data, which is not true"),
        pytest.param(lambda raw: pick(raw, np.r_[len(raw) - 1 : -1 : -1, 0:30]), id="backwards and doubled"),
    ],
)
def test_a_faulty_answer_is_noticed_and_completed(store: Store, fault: Callable[[RawBars], RawBars]) -> None:
    """Half an answer, a gap in its middle, a wrong "no data", duplicates out of order: the file is exact."""
    span = window("2024-01-01", "2024-03-01")
    history = FakeHistory.of(AAPL_1H, span, script={1: fault}, head=utc("1980-12-12"))
    job, _ = load(store, history, AAPL_1H, span)
    assert held(store, AAPL_1H) == expected_bars(AAPL_1H, span).opens.tolist()
    assert job.report.status == "success"
    assert job.report.proven_empty == 0


def test_a_hole_that_two_differently_shaped_requests_agree_on_is_proven_empty(store: Store) -> None:
    """A bar that IB does not have is asked for twice, in two shapes, and then never again; the evidence is kept."""
    span = window("2024-01-02", "2024-01-20")
    everything = expected_bars(AAPL_1H, span).opens
    history = FakeHistory(np.delete(everything, [30, 31, 50]))
    job, _ = load(store, history, AAPL_1H, span)
    assert len(history.requests) == 2
    first, second = history.requests
    assert (first.end, first.duration) != (second.end, second.duration)
    assert job.report.proven_empty == 3
    ranges = store.read_sidecar(AAPL_1H).proven_empty
    assert [r.opens for r in ranges] == [2, 1]
    assert all(len(r.evidence) == 2 for r in ranges)
    _, events = load(store, history, AAPL_1H, span)
    assert len(history.requests) == 2
    assert events == [e for e in events if isinstance(e, Planned)]  # January has other days that were not asked for


def test_a_failed_window_does_not_stop_the_others_and_is_exact_after_the_next_run(store: Store) -> None:
    """A time-out in the second of three windows: the others are loaded, the failure is listed, and the next run heals it."""
    span = window("2024-01-01", "2024-04-01")
    history = FakeHistory.of(AAPL_1H, span, script={2: RequestTimeout("no answer within 120 s")})
    job, events = load(store, history, AAPL_1H, span)
    failures = [e for e in events if isinstance(e, Failure)]
    assert len(failures) == 1
    assert "no answer" in str(failures[0].error)
    assert "AAPL 1h" in str(failures[0].error)
    assert job.report.status == "partial"
    assert job.report.missing_bars > 0
    assert "2024-02-01" not in job.report.completed
    history.script.clear()
    job, _ = load(store, history, AAPL_1H, span)
    assert held(store, AAPL_1H) == expected_bars(AAPL_1H, span).opens.tolist()
    assert sorted(job.report.completed) == ["2024-01-01", "2024-02-01", "2024-03-01"]
    assert len(history.requests) == 4


@pytest.mark.parametrize("error", [PermanentError("no permission", code=354), GatewayUnreachable("gone")])
def test_what_concerns_every_window_stops_at_once(store: Store, error: Exception) -> None:
    """A refusal or a gateway that is gone is not tried window by window; everything that remains counts as failed."""
    span = window("2024-01-01", "2024-04-01")
    history = FakeHistory.of(AAPL_1H, span, script={2: error})
    job, _ = load(store, history, AAPL_1H, span)
    assert len(history.requests) == 2
    (failure,) = job.report.failures
    assert failure.window.end >= utc("2024-03-28")


@pytest.mark.parametrize("error", [PacingError("pacing violation", code=162), TransientError("unknown 162", code=162)])
def test_a_failure_is_never_read_as_no_data(store: Store, error: Exception) -> None:
    """After a failure nothing is claimed about its window: no proof of emptiness, no answered window, no completion."""
    span = window("2024-01-02", "2024-01-20")
    history = FakeHistory.of(AAPL_1H, span, script={1: error})
    job, events = load(store, history, AAPL_1H, span)
    assert job.report.status == "failed"
    assert not [e for e in events if isinstance(e, Completed)]
    sidecar = store.read_sidecar(AAPL_1H)
    assert not sidecar.proven_empty
    assert not sidecar.answered


def test_a_failed_confirmation_keeps_the_bars_and_proves_nothing(store: Store) -> None:
    """The first answer has a hole and the second request fails: the bars stay, the hole stays open, the window failed."""
    span = window("2024-01-02", "2024-01-20")
    history = FakeHistory.of(AAPL_1H, span, script={1: drop(10, 20), 2: RequestTimeout("no answer")})
    job, _ = load(store, history, AAPL_1H, span)
    everything = expected_bars(AAPL_1H, span).opens
    assert len(held(store, AAPL_1H)) == len(everything) - 10
    assert not store.read_sidecar(AAPL_1H).proven_empty
    assert len(job.report.failures) == 1
    assert job.report.missing_bars == 10


def spoil(name: str, value: float) -> Callable[[RawBars], RawBars]:
    def fault(raw: RawBars) -> RawBars:
        getattr(raw, name)[5] = value
        return raw

    return fault


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("open", np.nan),
        ("high", np.inf),
        ("low", -1.0),
        ("high", 1.0),
        ("close", 1e9),
        ("volume", -5.0),
        ("close", 0.0),
    ],
)
def test_bars_that_break_the_rules_are_refused_and_nothing_of_their_window_is_written(
    store: Store, name: str, value: float
) -> None:
    """One bad bar in an answer: a data failure of that window with the row shown; the other window is loaded."""
    span = window("2024-01-01", "2024-03-01")
    history = FakeHistory.of(AAPL_1H, span, script={1: spoil(name, value)})
    # The bar has to lie inside the window to be judged.
    history.truth = history.truth[history.truth >= span.start_s]
    job, _ = load(store, history, AAPL_1H, span)
    (failure,) = job.report.failures
    assert failure.error.family == "data"
    assert min(held(store, AAPL_1H)) > failure.window.start_s
    assert job.report.missing_bars > 100


def test_two_different_bars_with_one_stamp_are_refused(store: Store) -> None:
    """A conflict is not settled by taking one of the two."""
    span = window("2024-01-02", "2024-01-20")

    def conflict(raw: RawBars) -> RawBars:
        doubled = pick(raw, np.r_[0 : len(raw), 7])
        doubled.close[-1] += 0.01
        return doubled

    job, _ = load(store, FakeHistory.of(AAPL_1H, span, script={1: conflict}), AAPL_1H, span)
    assert job.report.failures[0].error.family == "data"
    assert store.extent(AAPL_1H) is None


def test_the_forming_bar_is_never_stored(store: Store) -> None:
    """A load at 15:20 New York stores bars up to the one that closed at 15:00, though IB sends the forming one."""
    span = window("2024-06-10", "2024-06-15")
    now = utc("2024-06-14T19:20:00")
    history = FakeHistory.of(AAPL_1H, span)
    load(store, history, AAPL_1H, span, now=now)
    assert held(store, AAPL_1H)[-1] == int(utc("2024-06-14T18:00:00").timestamp())


def test_a_daily_bar_is_stored_only_after_its_session_has_closed(store: Store) -> None:
    """At 15:20 New York the day's own bar is still forming."""
    span = window("2024-06-01", "2024-06-20")
    history = FakeHistory.of(AAPL_1D, span)
    load(store, history, AAPL_1D, span, now=utc("2024-06-14T19:20:00"))
    assert held(store, AAPL_1D)[-1] == int(utc("2024-06-13").timestamp())
    load(store, history, AAPL_1D, span, now=utc("2024-06-14T20:00:00"))
    assert held(store, AAPL_1D)[-1] == int(utc("2024-06-14").timestamp())


def test_the_specifications_example_has_three_segments(store: Store) -> None:
    """RBLX 1d 2023-01-01 to 2025-05-30 with 2024-04-01 to 2025-05-01 held but for 2024-12-01 to 2024-12-10: three gaps, and
    only what is missing is fetched."""
    rblx = Series(stock("RBLX"), TIMEFRAMES["1d"])
    now = utc("2025-05-31")
    whole = window("2021-01-01", "2025-06-01")
    history = FakeHistory.of(rblx, whole)
    load(store, history, rblx, window("2024-04-01", "2024-12-01"), now=now)
    load(store, history, rblx, window("2024-12-10", "2025-05-01"), now=now)
    before = set(held(store, rblx))
    history.requests.clear()
    job, _ = load(store, history, rblx, window("2023-01-01", "2025-05-30"), now=now)
    assert job.report.gaps_analyzed == 3
    assert (
        len(history.requests) == 3
    )  # one year each reaches from 2023-01-01 over all three gaps; four would be wasteful
    expected = expected_bars(rblx, window("2023-01-01", "2025-05-30")).opens.tolist()
    assert held(store, rblx) == expected
    assert job.report.fetched_bars == len(set(expected) - before)


def test_a_tail_asks_for_the_last_held_bar_again_and_reports_a_revision(store: Store) -> None:
    """A held last bar that IB now answers differently is replaced, and said so."""
    span = window("2024-06-03", "2024-06-08")
    history = FakeHistory.of(AAPL_1H, window("2024-06-03", "2024-06-15"))
    load(store, history, AAPL_1H, span)
    last = held(store, AAPL_1H)[-1]

    def revise(raw: RawBars) -> RawBars:
        raw.volume[raw.opens_s == last] = 999_999
        return raw

    history.script[2] = revise
    tail = Window(span.end.replace(day=7, hour=19), utc("2024-06-15"))
    job, _ = load(store, history, AAPL_1H, tail, recheck_last=True)
    assert len(history.requests) == 2
    assert job.report.revised_bars == 1
    bars = store.read_bars(AAPL_1H)
    assert bars["volume"][opens_of(bars) == last].tolist() == [999_999]
    assert any("other values" in notice for notice in job.report.notices)


def test_windows_before_the_first_bar_are_not_asked_one_by_one(store: Store) -> None:
    """Ten years before the listing cost one empty answer and one head timestamp, and are complete without bars."""
    listed = window("2023-03-10", "2024-01-01")
    history = FakeHistory.of(AAPL_1D, listed, head=utc("2023-03-10T14:30:00"))
    job, _ = load(store, history, AAPL_1D, window("2010-01-01", "2024-01-01"))
    assert held(store, AAPL_1D) == expected_bars(AAPL_1D, listed).opens.tolist()
    assert history.heads_asked == 1
    assert len(history.requests) <= 3
    assert job.report.segments_fetched == 1  # nine years of it were settled without being asked
    assert sorted(job.report.completed) == [str(year) for year in range(2010, 2024)]
    assert job.report.completed["2015"].rows == 0
    start = store.read_sidecar(AAPL_1D).history_start
    assert start is not None
    assert start.open == utc("2023-03-10")


def test_a_head_timestamp_that_is_years_too_late_loses_nothing(store: Store) -> None:
    """IB's hint says 2020 and the bars begin in 2013: every one of them is found."""
    listed = window("2013-05-06", "2024-01-01")
    history = FakeHistory.of(AAPL_1D, listed, head=utc("2020-01-02T14:30:00"))
    load(store, history, AAPL_1D, window("2010-01-01", "2024-01-01"))
    assert held(store, AAPL_1D) == expected_bars(AAPL_1D, listed).opens.tolist()


def test_a_gap_is_not_taken_for_the_start_of_history(store: Store) -> None:
    """An explicit start in the middle of history whose first day IB does not have does not hide the years before it."""
    everything = expected_bars(AAPL_1D, window("2020-01-01", "2024-01-01")).opens
    hole = int(utc("2022-01-03").timestamp())
    history = FakeHistory(everything[everything != hole], head=utc("2020-01-02T14:30:00"))
    load(store, history, AAPL_1D, window("2022-01-01", "2024-01-01"))
    assert store.read_sidecar(AAPL_1D).history_start is None
    load(store, history, AAPL_1D, window("2020-01-01", "2024-01-01"))
    assert held(store, AAPL_1D) == history.truth.tolist()


def test_bars_that_the_calendar_does_not_expect_are_kept_and_reported(store: Store) -> None:
    """IB knows better than the calendar: a Saturday session stays in the file."""
    span = window("2024-01-02", "2024-01-20")
    saturday = int(utc("2024-01-06T15:00:00").timestamp())
    truth = np.sort(np.append(expected_bars(AAPL_1H, span).opens, saturday))
    job, _ = load(store, FakeHistory(truth), AAPL_1H, span)
    assert saturday in held(store, AAPL_1H)
    assert job.report.unexpected_bars == 1
    assert any("IB and the calendar disagree (1 bars" in notice for notice in job.report.notices)


@pytest.mark.parametrize("series", [AAPL_1H, AAPL_1D], ids=["1h", "1d"])
def test_an_answer_that_is_shifted_is_not_stored(store: Store, series: Series) -> None:
    """Bars where the calendar has none and none where it has them, and a second answer knows nothing of that: one of the two is
    wrong. The window has failed without a trace in the file, and the next run completes it."""
    span = window("2024-01-02", "2024-02-20")
    shift_s = 3600 if series.timeframe.is_intraday else 86400
    shifted = lambda raw: RawBars(raw.opens_s - shift_s, *(getattr(raw, n) for n in VALUES))  # noqa: E731 - a fault
    history = FakeHistory.of(series, span, script={1: shifted})
    job, _ = load(store, history, series, span)
    assert isinstance(job.report.failures[0].error, DataError)
    assert set(held(store, series)) <= set(history.truth.tolist())
    load(store, history, series, span)
    assert held(store, series) == history.truth.tolist()
    written = store.read_bars(series)
    assert written["open"].tolist() == raw_bars(history.truth).open.tolist()


def test_a_calendar_that_two_answers_disprove_costs_no_further_request(store: Store) -> None:
    """A closed day and a Saturday session: the answer waits for the second one that its holes need anyway."""
    span = window("2024-01-02", "2024-01-20")
    expected = expected_bars(AAPL_1H, span).opens
    closed = (expected >= utc("2024-01-09").timestamp()) & (expected < utc("2024-01-10").timestamp())
    saturday = int(utc("2024-01-06T15:00:00").timestamp())
    history = FakeHistory(np.sort(np.append(expected[~closed], saturday)))
    job, _ = load(store, history, AAPL_1H, span)
    assert held(store, AAPL_1H) == history.truth.tolist()
    assert (job.report.status, job.report.proven_empty, len(history.requests)) == ("success", int(closed.sum()), 2)


def test_bars_of_closed_time_are_kept_where_two_loads_meet(store: Store) -> None:
    """A gateway with a bar in every daily break: the one between the end of one load and the first missing bar of the next
    belongs to neither's gaps, and is not lost."""
    series = Series(forex("EURUSD"), TIMEFRAMES["1h"])
    span = window("2024-01-08", "2024-01-20")
    expected = expected_bars(series, span)
    truth = np.union1d(expected.opens, expected.aliases)
    job, _ = load(store, FakeHistory(truth), series, window("2024-01-08", "2024-01-10T22:00"))
    assert held(store, series) == truth[truth < int(utc("2024-01-10T22:00").timestamp())].tolist()
    load(store, FakeHistory(truth), series, span)
    assert held(store, series) == truth.tolist()
    # The stamp on the clock grid of a first bar off it is known to the calendar (17:00 for 17:15).
    assert job.report.unexpected_bars == 0


def test_whole_sessions_without_a_bar_are_reported(store: Store) -> None:
    """A day that the calendar takes for a session and IB does not: proven, and said, with what to do."""
    span = window("2024-01-02", "2024-01-20")
    everything = expected_bars(AAPL_1H, span).opens
    closed = (everything // 86400) == int(utc("2024-01-09").timestamp()) // 86400
    job, _ = load(store, FakeHistory(everything[~closed]), AAPL_1H, span)
    assert (job.report.proven_empty, job.report.empty_sessions) == (7, 1)
    assert any("`ktrdr calendar AAPL`" in notice for notice in job.report.notices)


def test_forex_volume_is_zero_in_the_file_and_none_in_the_sidecar(store: Store) -> None:
    """IB sends -1 where it has no volume."""
    series = Series(forex("EURUSD"), TIMEFRAMES["1h"])
    span = window("2024-01-08", "2024-01-13")

    def no_volume(raw: RawBars) -> RawBars:
        raw.volume[:] = -1
        return raw

    load(store, FakeHistory.of(series, span, script={1: no_volume}), series, span)
    assert set(store.read_bars(series)["volume"]) == {0.0}
    pinned = store.read_sidecar(series).instrument
    assert pinned is not None
    assert pinned.volume_unit == "none"


def test_progress_is_reported_request_by_request(store: Store) -> None:
    """Events come in order, one for each request, with counts that a person can follow."""
    span = window("2024-01-01", "2024-04-01")
    _, events = load(store, FakeHistory.of(AAPL_1H, span), AAPL_1H, span)
    fetched = [e for e in events if isinstance(e, Fetched)]
    assert [(e.done, e.planned) for e in fetched] == [(1, 3), (2, 3), (3, 3)]
    assert sum(e.rows for e in fetched) == 427


def test_a_sparse_series_keeps_windows_instead_of_ranges(store: Store) -> None:
    """Minutes without trades have no bars: after three windows whose second answer agreed, no range is kept for each of them,
    nothing is asked again, and an answer of which half is missing is still noticed."""
    series = Series(stock("TINY"), TIMEFRAMES["1m"])
    span = window("2024-03-04", "2024-03-16")
    everything = expected_bars(series, span).opens
    minute = np.arange(len(everything)) % 390
    rare = everything[(minute % 7 != 3) | (minute > 385)]
    history = FakeHistory(rare)
    job, _ = load(store, history, series, span)
    assert held(store, series) == rare.tolist()
    assert len(history.requests) == 2 * 10
    sidecar = store.read_sidecar(series)
    assert sidecar.sparse
    assert len(sidecar.proven_empty) < 3 * 60
    assert len(sorted(job.report.completed)) == 10
    again, _ = load(store, history, series, span)
    assert again.report.ib_requests_made == 0
    later = window("2024-03-18", "2024-03-19")
    minutes = expected_bars(series, later).opens
    history.truth = minutes[(np.arange(390) % 7 != 3) | (np.arange(390) > 385)]
    history.script[len(history.requests) + 1] = lambda raw: pick(raw, slice(0, len(raw) // 2))
    load(store, history, series, later)
    assert held(store, series) == rare.tolist() + history.truth.tolist()


def test_empty_answers_without_a_word_prove_nothing(store: Store) -> None:
    """Twice no bars and no sentence of IB's that there are none: the window has failed, and the next run completes it."""
    span = window("2024-02-01", "2024-03-01")
    nothing = lambda raw: pick(raw, slice(0, 0))  # noqa: E731 - a fault, as in the table above
    history = FakeHistory.of(AAPL_1H, span, script=dict.fromkeys(range(1, 7), nothing), head=utc("1980-12-12"))
    job, _ = load(store, history, AAPL_1H, span)
    assert job.report.status == "failed"
    assert job.report.failures[0].error.is_transient
    assert not store.read_sidecar(AAPL_1H).proven_empty
    history.script.clear()
    load(store, history, AAPL_1H, span)
    assert held(store, AAPL_1H) == expected_bars(AAPL_1H, span).opens.tolist()


def test_empty_answers_without_a_word_prove_what_the_head_timestamp_says_too(store: Store) -> None:
    """A gateway that says "nothing there" with an empty list: twice asked, and older than its head timestamp, that is so."""
    span = window("2024-01-02", "2024-05-01")
    history = FakeHistory.of(AAPL_1H, window("2024-03-14", "2024-05-01"), head=utc("2024-03-14T13:30:00"))
    no_words = lambda raw: raw if len(raw.opens_s) else raw_bars(raw.opens_s)  # noqa: E731 - a habit
    history.script = dict.fromkeys(range(1, 40), no_words)
    job, _ = load(store, history, AAPL_1H, span)
    assert (job.report.status, held(store, AAPL_1H)) == ("success", history.truth.tolist())
    asked = len(history.requests)
    load(store, history, AAPL_1H, span)
    assert len(history.requests) == asked


def test_what_a_failed_window_completed_is_reported(store: Store) -> None:
    """One request for a month of minutes, one hole whose confirmation fails: the other days are complete and say so."""
    series = Series(stock("AAPL"), TIMEFRAMES["1m"])
    span = window("2024-03-04", "2024-03-16")
    history = FakeHistory.of(series, span, script={1: drop(400, 410), 2: RequestTimeout("no answer")})
    job, _ = load(store, history, series, span, limits=HistoryLimits.CURRENT)
    assert job.report.status == "partial"
    assert len(job.report.completed) == 9
    assert "2024-03-05" not in job.report.completed


@pytest.mark.parametrize(
    ("series", "closed", "later"),
    [(AAPL_1H, "2024-06-14T18:00:30", "2024-06-14T18:20:00"), (AAPL_1D, "2024-06-14T20:20:00", "2024-06-17T12:00:00")],
)
def test_a_bar_that_ib_has_not_got_yet_is_not_proven_empty(
    store: Store, series: Series, closed: str, later: str
) -> None:
    """Moments after its close IB may lack the newest bar, and two questions in one second agree: it stays missing, and the next
    load gets it."""
    span = window("2024-06-03", "2024-06-22")
    late = utc(closed)
    history = FakeHistory.of(series, span)
    newest = expected_bars(series, span, complete_at_s=int(late.timestamp())).opens[-1]
    for n in range(1, 4):
        history.script[n] = lambda raw: pick(raw, raw.opens_s < newest)
    job, _ = load(store, history, series, span, now=late)
    assert job.report.status == "success"
    assert job.report.missing_bars == 1
    assert not store.read_sidecar(series).proven_empty
    assert any("not there yet" in notice for notice in job.report.notices)
    assert max(held(store, series)) < newest
    history.script.clear()
    load(store, history, series, span, now=utc(later))
    assert newest in held(store, series)


def test_a_head_timestamp_later_than_held_bars_is_not_believed(store: Store) -> None:
    """One missing bar at the start of a window and a head timestamp that is years too late: the months before are still asked."""
    everything = expected_bars(AAPL_1H, window("2024-02-01", "2024-04-01")).opens
    first = int(utc("2024-03-04T14:30:00").timestamp())
    history = FakeHistory(everything[everything != first], head=utc("2025-01-01"))
    load(store, history, AAPL_1H, window("2024-03-04", "2024-03-20"), now=utc("2024-06-15"))
    assert store.read_sidecar(AAPL_1H).history_start is None
    load(store, history, AAPL_1H, window("2024-02-01", "2024-04-01"), now=utc("2024-06-15"))
    assert held(store, AAPL_1H) == history.truth.tolist()


@pytest.mark.parametrize("name", ["1w", "1mo"])
@pytest.mark.parametrize("label", ["first", "last"])
def test_weeks_and_months_may_be_labelled_with_any_of_their_days(store: Store, name: str, label: str) -> None:
    """Monday or Friday, the first day or the last session of a month: every finished bar is stored, the forming one not."""
    series = Series(stock("AAPL"), TIMEFRAMES[name])
    # Friday 2024-06-28 after the close: the week and the month have just ended.
    now, span = utc("2024-06-28T20:30:00"), window("2023-01-01", "2025-01-01")
    days = expected_bars(AAPL_1D, window("2023-01-01", "2024-07-20")).opens
    if name == "1w":
        labels = days - (days // 86400 + 3) % 7 * 86400
        labels = np.unique(labels) + (0 if label == "first" else 4 * 86400)
    else:
        months = days.astype("datetime64[s]").astype("datetime64[M]")
        last_days = np.append(np.diff(months.astype(np.int64)) > 0, True)
        labels = days[last_days] if label == "last" else np.unique(months).astype("datetime64[s]").astype(np.int64)
    history = FakeHistory(labels)
    load(store, history, series, span, now=now)
    expected = [s for s in labels.tolist() if s <= int(utc("2024-06-30").timestamp())]
    assert held(store, series) == expected
    again, _ = load(store, history, series, span, now=now)
    assert again.report.ib_requests_made == 0


@pytest.mark.parametrize("name", ["1w", "1mo"])
@pytest.mark.parametrize("label", ["before", "after"])
def test_labels_that_fit_two_weeks_or_months_are_refused(store: Store, name: str, label: str) -> None:
    """All on Sundays, or on the last days of months whatever their weekday: their period is ambiguous, so nothing is
    stored; unless one lies after the request's end, for then it ends its period."""
    series = Series(stock("AAPL"), TIMEFRAMES[name])
    now, span = utc("2024-06-28T20:30:00"), window("2023-07-01", "2024-06-29")
    periods = np.arange("2023-06", "2024-08", dtype="datetime64[M]").astype("datetime64[s]").astype(np.int64)
    labels = periods - 86400
    if name == "1w":
        labels = np.arange(int(utc("2023-06-04").timestamp()), int(utc("2024-07-14").timestamp()), 7 * 86400)
    history = FakeHistory(labels)
    if label == "after":
        # What the request asked for ends with the week or month of its last bar, which this label closes.
        reach_s = {"1w": 7, "1mo": 31}[name] * 86400

        def fetch(series: Series, request: Request, _call: Call | None = None) -> RawBars:
            history.requests.append(request)
            end_s = int(request.end.timestamp())
            return raw_bars(labels[(labels < end_s + reach_s) & (labels > end_s - 366 * 86400)])

        history.fetch = fetch  # type: ignore[method-assign]
    job, _ = load(store, history, series, span, now=now)
    if label == "before":
        assert "before their period" in str(job.report.failures[0].error)
        assert held(store, series) == []
        assert not store.read_sidecar(series).proven_empty
    else:
        assert job.report.failures == []
        assert len(held(store, series)) == len(expected_bars(series, span))


def test_weeks_round_the_clock_end_on_sundays(store: Store) -> None:
    """Where Sunday is a session it is the label of its week."""
    series = Series(Instrument("BTC", "CRYPTO", "PAXOS", "USD"), TIMEFRAMES["1w"])
    span = window("2023-07-03", "2024-06-01")
    history = FakeHistory.of(series, span)
    job, _ = load(store, history, series, span)
    assert job.report.failures == []
    assert held(store, series) == history.truth.tolist()


def test_a_bar_cut_off_by_the_end_of_its_request_is_not_stored(store: Store) -> None:
    """A gateway that trades through the forex break sends a bar that stops where the request ends: it is not taken for whole."""
    series = Series(forex("EURUSD"), TIMEFRAMES["5m"])
    span = window("2024-01-08", "2024-01-13")
    grid = np.arange(span.start_s, span.end_s, 300, dtype=np.int64)
    history = FakeHistory(grid)
    load(store, history, series, span)
    ends = [int(request.end.timestamp()) for request in history.requests]
    assert not [s for s in held(store, series) if any(s < end < s + 300 for end in ends)]


def test_daily_bars_dated_by_the_start_of_their_session_are_not_lost(store: Store) -> None:
    """Forex days stamped Sunday to Thursday: none is missed where two requests meet."""
    series = Series(forex("EURUSD"), TIMEFRAMES["1d"])
    span = window("2022-01-01", "2024-06-01")
    days = expected_bars(series, window("2021-12-20", "2024-06-10")).opens
    labels = days - 86400
    history = FakeHistory(labels)
    load(store, history, series, span, now=utc("2024-06-15"))
    found = held(store, series)
    wanted = [s for s in labels.tolist() if utc("2022-01-03").timestamp() <= s < utc("2024-05-30").timestamp()]
    assert [s for s in wanted if s not in found] == []


def test_a_gateway_that_sends_a_few_bars_at_a_time_is_asked_until_it_is_done(store: Store) -> None:
    """Sixty bars an answer: as long as each brings some, the window is completed."""
    series = Series(stock("AAPL"), TIMEFRAMES["1m"])
    span = window("2024-03-04", "2024-03-05")
    history = FakeHistory.of(series, span)
    history.script = {n: lambda raw: pick(raw, slice(-60, None)) for n in range(1, 40)}
    job, _ = load(store, history, series, span)
    assert job.report.status == "success"
    assert held(store, series) == expected_bars(series, span).opens.tolist()


def test_a_csv_with_a_header_and_no_row_is_an_empty_one(store: Store) -> None:
    """Somebody deleted every row: everything is asked for."""
    store.data_dir.mkdir()
    store.csv_path(AAPL_1H).write_text("timestamp,open,high,low,close,volume\n")
    span = window("2024-01-02", "2024-01-20")
    load(store, FakeHistory.of(AAPL_1H, span), AAPL_1H, span)
    assert held(store, AAPL_1H) == expected_bars(AAPL_1H, span).opens.tolist()


def test_a_folder_that_refuses_is_found_out_before_ib_is_asked(tmp_path: Path) -> None:
    """A request that could not be kept is not made: it would cost budget and bring nothing."""
    (tmp_path / "data").write_text("a file where the folder should be")
    store = Store(tmp_path / "data")
    span = window("2024-01-02", "2024-01-20")
    history = FakeHistory.of(AAPL_1H, span)
    with pytest.raises(StoreError):
        load(store, history, AAPL_1H, span)
    assert history.requests == []
    readable = Store(Path("/proc"))
    with pytest.raises(StoreError) as refused:
        load(readable, history, AAPL_1H, span)
    assert "another process" not in str(refused.value)
    assert history.requests == []


def test_a_cut_answer_of_a_sparse_series_is_noticed(store: Store) -> None:
    """However many bars of a series are absent: what one answer does not have and another has is in the file."""
    series = Series(stock("TINY"), TIMEFRAMES["1m"])
    span = window("2024-03-04", "2024-03-16")
    everything = expected_bars(series, span).opens
    history = FakeHistory(everything[np.arange(len(everything)) % 7 != 3])
    history.script[13] = drop(60, 300)
    load(store, history, series, span)
    assert held(store, series) == history.truth.tolist()


def test_a_head_timestamp_that_is_the_first_bar_does_not_disprove_it(store: Store) -> None:
    """The answer does not have the very bar at which history starts by the head timestamp: it is asked for again."""
    listed = window("2024-03-04", "2024-03-20")
    history = FakeHistory.of(AAPL_1H, listed, head=utc("2024-03-04T14:30:00"))
    first = int(history.truth[0])
    history.script[1] = lambda raw: pick(raw, raw.opens_s > first)
    load(store, history, AAPL_1H, window("2024-03-01", "2024-03-20"))
    assert held(store, AAPL_1H) == history.truth.tolist()


def test_a_gateway_that_sends_very_few_bars_never_proves_the_rest_empty(store: Store) -> None:
    """Five bars an answer: completed, or failed loudly; nothing is taken for proven."""
    series = Series(stock("AAPL"), TIMEFRAMES["1m"])
    span = window("2024-03-04", "2024-03-05")
    history = FakeHistory.of(series, span)
    history.script = {n: lambda raw: pick(raw, slice(-5, None)) for n in range(1, 200)}
    job, _ = load(store, history, series, span)
    assert job.report.failures
    assert not store.read_sidecar(series).proven_empty
    history.script.clear()
    load(store, history, series, span)
    assert held(store, series) == history.truth.tolist()


def test_a_late_run_of_newest_bars_is_late_as_a_whole(store: Store) -> None:
    """IB's feed lags by twenty minutes: none of the twenty minutes counts as absent, and the next load has them all."""
    series = Series(stock("AAPL"), TIMEFRAMES["1m"])
    span = window("2024-06-14", "2024-06-15")
    now = utc("2024-06-14T18:30:00")
    history = FakeHistory.of(series, span)
    lag = int(now.timestamp()) - 20 * 60
    history.script = {n: lambda raw: pick(raw, raw.opens_s < lag) for n in range(1, 9)}
    job, _ = load(store, history, series, span, now=now)
    assert job.report.missing_bars == 20
    assert not store.read_sidecar(series).proven_empty
    history.script.clear()
    load(store, history, series, span, now=utc("2024-06-14T18:40:00"))
    assert len(held(store, series)) == 310


@pytest.mark.parametrize("mode", [Mode.TAIL, Mode.BACKFILL, Mode.FULL])
def test_the_next_load_of_a_mode_finds_the_window_that_failed(store: Store, mode: Mode) -> None:
    """One of three windows fails and bars beyond it are held: the same mode begins at the hole next time, not beyond it."""
    begin, now = utc("2024-01-02"), utc("2024-06-01")
    history = FakeHistory.of(AAPL_1H, Window(begin, now), head=utc("1980-12-12"))
    held_before = {
        Mode.TAIL: window("2024-01-02", "2024-01-20"),
        Mode.BACKFILL: window("2024-05-10", "2024-06-01"),
        Mode.FULL: window("2024-02-10", "2024-02-20"),
    }
    load(store, history, AAPL_1H, held_before[mode], now=now)
    failing = len(history.requests) + (2 if mode is Mode.BACKFILL else 1)
    history.script = {failing: RequestTimeout("no answer within 120 s")}
    for _ in range(2):
        held_by_modes = Held.of(store.extent(AAPL_1H), store.read_sidecar(AAPL_1H))
        request = LoadRequest("AAPL", AAPL_1H.timeframe, mode, None if mode is Mode.TAIL else begin)
        load(store, history, AAPL_1H, resolve_window(request, held_by_modes, until=now), now=now)
    assert len(history.requests) > failing
    assert held(store, AAPL_1H) == history.truth[history.truth >= begin.timestamp()].tolist()
    sidecar = store.read_sidecar(AAPL_1H)
    assert (sidecar.unfinished_from, sidecar.unfinished_until) == (None, None)


def test_a_first_load_that_failed_half_way_is_finished_by_a_tail(store: Store) -> None:
    """With no CSV a tail loads everything; if its first window fails, the next tail begins there."""
    span = window("2024-01-02", "2024-04-01")
    history = FakeHistory.of(AAPL_1H, span, script={1: RequestTimeout("no answer")}, head=utc("1980-12-12"))
    load(store, history, AAPL_1H, span, now=span.end)
    held_by_modes = Held.of(store.extent(AAPL_1H), store.read_sidecar(AAPL_1H))
    tail = resolve_window(LoadRequest("AAPL", AAPL_1H.timeframe, Mode.TAIL), held_by_modes, until=span.end)
    assert tail.start <= span.start + timedelta(days=1)
    load(store, history, AAPL_1H, tail, now=span.end, recheck_last=True)
    assert held(store, AAPL_1H) == history.truth.tolist()


def test_what_a_load_is_about_to_ask_for_is_written_down_before_its_first_bar(store: Store) -> None:
    """Killed after any write, it leaves behind where the next tail or backfill has to begin."""
    history = FakeHistory.of(AAPL_1H, window("2024-01-02", "2024-06-01"), head=utc("1980-12-12"))
    load(store, history, AAPL_1H, window("2024-03-01", "2024-03-20"))
    seen: list[tuple[datetime | None, datetime | None]] = []

    def look(raw: RawBars) -> RawBars:
        sidecar = store.read_sidecar(AAPL_1H)
        seen.append((sidecar.unfinished_from, sidecar.unfinished_until))
        return raw

    history.script = dict.fromkeys(range(2, 20), look)
    load(store, history, AAPL_1H, window("2024-01-02", "2024-06-01"))
    since, until = seen[0]
    assert since is not None
    assert until is not None
    assert since <= utc("2024-03-20T20:00:00")
    assert utc("2024-02-29T21:00:00") <= until
    assert held(store, AAPL_1H) == history.truth.tolist()


def test_bars_that_form_by_the_gateways_clock_are_not_stored(store: Store) -> None:
    """The gateway's time is ten minutes behind ours: its newest bar is still forming, whatever our clock says."""
    series = Series(stock("AAPL"), TIMEFRAMES["1m"])
    span, now = window("2024-06-14", "2024-06-15"), utc("2024-06-14T18:30:00")
    history = FakeHistory.of(series, span, clock_lag_s=600.0)
    history.script = {n: lambda raw: pick(raw, raw.opens_s <= int(now.timestamp()) - 600) for n in range(1, 9)}
    job, _ = load(store, history, series, span, now=now)
    assert held(store, series)[-1] == int(utc("2024-06-14T18:19:00").timestamp())
    assert job.report.missing_bars == 10
    assert not store.read_sidecar(series).proven_empty
    assert any("clock is 600 s behind" in notice for notice in job.report.notices)
    assert len(history.requests) == 1
    assert job.report.status == "partial"
    (failure,) = job.report.failures
    assert "5 bars that are complete" in str(failure.error)
    assert failure.error.is_transient
    assert not store.read_sidecar(series).proven_empty
    load(store, FakeHistory.of(series, span), series, span, now=now)
    assert held(store, series)[-1] == int(utc("2024-06-14T18:29:00").timestamp())


def test_a_gateways_clock_that_is_a_little_behind_fails_no_load(store: Store) -> None:
    """Two minutes: the newest bars are left for the next load, with a word."""
    series = Series(stock("AAPL"), TIMEFRAMES["1m"])
    span, now = window("2024-06-14", "2024-06-15"), utc("2024-06-14T18:30:00")
    history = FakeHistory.of(series, span, clock_lag_s=120.0)
    history.script = {n: lambda raw: pick(raw, raw.opens_s <= int(now.timestamp()) - 120) for n in range(1, 9)}
    job, _ = load(store, history, series, span, now=now)
    assert (job.report.status, job.report.failures, job.report.missing_bars) == ("success", [], 2)
    assert any("clock is 120 s behind" in notice for notice in job.report.notices)


def test_a_gateways_clock_that_its_own_bars_disprove_is_not_believed(store: Store) -> None:
    """A gateway whose clock shows last year and which sends this year's bars: they are whole, and none is held back."""
    series = Series(stock("AAPL"), TIMEFRAMES["1m"])
    span, now = window("2024-06-13", "2024-06-15"), utc("2024-06-14T18:30:00")
    history = FakeHistory.of(series, span, clock_lag_s=365 * 86400.0)
    history.script = {n: lambda raw: pick(raw, raw.opens_s <= int(now.timestamp())) for n in range(1, 9)}
    job, _ = load(store, history, series, span, now=now)
    assert held(store, series)[-1] == int(utc("2024-06-14T18:29:00").timestamp())
    assert (job.report.missing_bars, len(history.requests)) == (0, 2)
    assert [notice for notice in job.report.notices if "its clock is ignored" in notice]


class EditedStore(Store):
    """An editor saves the file without the new bars right after each write."""

    def write(self, series: Series, bars: pd.DataFrame, **more: Any) -> Written:
        before = self.csv_path(series).read_bytes()
        written = super().write(series, bars, **more)
        if len(bars):
            self.csv_path(series).write_bytes(before)
        return written


def test_bars_that_another_program_takes_away_are_not_proven_empty(tmp_path: Path) -> None:
    """Two answers brought them, the file has them not: a failure, and the next load brings them for good."""
    january, months = window("2024-01-01", "2024-02-01"), window("2024-01-01", "2024-03-01")
    history = FakeHistory.of(AAPL_1H, months)
    load(Store(tmp_path), history, AAPL_1H, january)
    edited, _ = load(EditedStore(tmp_path), history, AAPL_1H, months)
    assert "another program changed it" in str(edited.report.failures[0].error)
    store = Store(tmp_path)
    assert store.read_sidecar(AAPL_1H).proven_empty == ()
    load(store, history, AAPL_1H, months)
    assert held(store, AAPL_1H) == history.truth.tolist()


def test_years_before_the_listing_are_settled_by_a_gateway_that_has_no_words_for_nothing(store: Store) -> None:
    """It sends no bars and no sentence: two such answers and a head timestamp that agrees are the start of history; the load
    succeeds and the next one asks nothing."""
    listed = window("2021-03-10", "2024-01-01")
    span = window("2018-01-01", "2024-01-01")
    history = FakeHistory.of(AAPL_1D, listed, head=utc("2021-03-10T14:30:00"))
    load(store, history, AAPL_1D, window("2023-01-01", "2024-01-01"))
    history.script = dict.fromkeys(range(1, 40), lambda raw: replace(raw, no_data_text=""))
    job, _ = load(store, history, AAPL_1D, span)
    assert (job.report.status, job.report.missing_bars) == ("success", 0)
    assert held(store, AAPL_1D) == history.truth.tolist()
    asked = len(history.requests)
    load(store, history, AAPL_1D, span)
    assert len(history.requests) == asked


def test_another_contract_under_the_name_is_refused_before_a_bar_is_asked_for(tmp_path: Path) -> None:
    """IB gave the symbol to another company: its prices say nothing, its conId does."""
    store, span = Store(tmp_path / "data"), window("2024-03-01", "2024-04-01")
    load(store, FakeHistory.of(AAPL_1H, span), AAPL_1H, span)
    before = store.csv_path(AAPL_1H).read_bytes()
    history = FakeHistory.of(AAPL_1H, window("2024-03-01", "2024-06-01"))
    pin = history.pin
    history.pin = lambda instrument, call: replace(pin(instrument, call), con_id=99)  # type: ignore[method-assign]
    job, _ = load(store, history, AAPL_1H, window("2024-03-01", "2024-06-01"))
    (failure,) = job.report.failures
    assert isinstance(failure.error, StoreError)
    assert "the file holds conId 4711 (offered: 99)" in str(failure.error)
    assert history.requests == []
    assert store.csv_path(AAPL_1H).read_bytes() == before


def test_a_volume_that_ib_does_not_tell_is_stored_as_none_and_said_once(tmp_path: Path) -> None:
    """-1 beside real volumes: a person who trusts in volumes has to know."""
    store, span = Store(tmp_path / "data"), window("2024-01-01", "2024-04-01")

    def untold(raw: RawBars) -> RawBars:
        volume = raw.volume.copy()
        volume[::5] = -1
        return replace(raw, volume=volume)

    history = FakeHistory.of(AAPL_1H, span, script=dict.fromkeys(range(1, 9), untold))
    job, _ = load(store, history, AAPL_1H, span)
    assert len(history.requests) > 1
    assert (store.read_bars(AAPL_1H)["volume"] == 0).any()
    assert sum("no volume" in notice for notice in job.report.notices) == 1
    euro = Series(forex("EURUSD"), TIMEFRAMES["1h"])
    pairs = FakeHistory.of(euro, span, script=dict.fromkeys(range(1, 9), untold))
    job, _ = load(store, pairs, euro, span)
    assert not any("no volume" in notice for notice in job.report.notices)
