"""Two faults in one load: a changed price scale behind bad values, a disk that refuses the claims only, a file that another
program removes while IB is asked. Neither may hide the other."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from ktrdr_pipelines.bars.restatement import ScaleChanged
from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.calls import Call
from ktrdr_pipelines.domain.instruments import Instrument, Series, forex, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.errors import DataError, RequestTimeout, StoreError, TransientError
from ktrdr_pipelines.ib.client import RawBars
from ktrdr_pipelines.loading.report import LoadReport
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.store.atomic import Disk
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import FakeHistory, pick, run_load, utc, window

AAPL = Series(stock("AAPL"), TIMEFRAMES["1h"])
NOW = utc("2024-06-15")
WHOLE = window("2024-01-01", "2024-05-01")
JANUARY = window("2024-01-01", "2024-02-01")


def load(
    store: Store, history: FakeHistory, span: Window = WHOLE, series: Series = AAPL, now: datetime = NOW
) -> LoadReport:
    it = Load(series, span, store=store, history=lambda: history, limits=HistoryLimits.CLASSIC, now=lambda: now)
    list(run_load(it))
    return it.report


def held(store: Store, series: Series = AAPL) -> list[int]:
    return [int(second) for second in opens_of(store.read_bars(series))]


def halve(raw: RawBars) -> RawBars:
    """The prices after a split 2:1."""
    return replace(raw, open=raw.open / 2, high=raw.high / 2, low=raw.low / 2, close=raw.close / 2)


def spoil_last(raw: RawBars) -> RawBars:
    return replace(raw, close=np.append(raw.close[:-1], np.nan))


def double_last(raw: RawBars) -> RawBars:
    """Two different bars with the last stamp."""
    twice = pick(raw, np.append(np.arange(len(raw)), len(raw) - 1))
    return replace(twice, close=np.append(raw.close, raw.close[-1] - 0.01))


def only_before(raw: RawBars) -> RawBars:
    """Bars before the window only, and those on another price scale."""
    return pick(halve(raw), raw.opens_s < utc("2024-01-31").timestamp())


@pytest.mark.parametrize(
    "spoil", [lambda raw: spoil_last(halve(raw)), lambda raw: double_last(halve(raw))], ids=["bad value", "two bars"]
)
def test_a_split_is_found_in_an_answer_that_is_refused_for_its_bars(
    tmp_path: Path, spoil: Callable[[RawBars], RawBars]
) -> None:
    """The next window has no bar in common with the file: written, it would mix two price scales without a trace."""
    store = Store(tmp_path)
    history = FakeHistory.of(AAPL, WHOLE)
    load(store, history, JANUARY)
    before = held(store)
    history.requests.clear()
    history.script = {1: spoil} | dict.fromkeys(range(2, 20), halve)
    report = load(store, history)
    assert [type(failure.error) for failure in report.failures] == [ScaleChanged]
    assert len(history.requests) == 1
    assert held(store) == before


def test_a_split_is_found_in_an_answer_with_bars_beside_its_window_only(tmp_path: Path) -> None:
    """Nothing of it is written, and the probe after it fails: the episode still ends with the split."""
    store = Store(tmp_path)
    history = FakeHistory.of(AAPL, WHOLE, reaches_back_s=5 * 86400)
    load(store, history, JANUARY)
    before = held(store)
    history.requests.clear()
    history.script = {1: only_before, 2: RequestTimeout("no answer within 120 s")} | dict.fromkeys(range(3, 20), halve)
    report = load(store, history, window("2024-02-01", "2024-05-01"))
    assert [type(failure.error) for failure in report.failures] == [ScaleChanged]
    assert held(store) == before


class FullDisk(Disk):
    """Refuses sidecars while ``is_full``."""

    is_full = False

    def replace(self, source: Path, target: Path) -> None:
        if self.is_full and target.suffix == ".json":
            raise OSError(errno.ENOSPC, "No space left on device")
        super().replace(source, target)


def test_bars_whose_claims_the_disk_refuses_are_held_and_the_rest_is_remembered(tmp_path: Path) -> None:
    """The CSV was replaced, the sidecar was not: the report counts the bars that are in the file, and the next tail does not
    pass over those that are not."""
    disk = FullDisk()
    store = Store(tmp_path, disk=disk)
    truth = expected_bars(AAPL, WHOLE).opens
    history = FakeHistory(np.delete(truth, np.arange(20, 30)))

    def fill(raw: RawBars) -> RawBars:
        disk.is_full = True
        return raw

    history.script = {1: fill}
    report = load(store, history)
    assert [type(failure.error) for failure in report.failures] == [StoreError]
    assert len(held(store)) > 100
    assert report.missing_bars == len(truth) - len(held(store))
    disk.is_full = False
    since = store.read_sidecar(AAPL).unfinished_from
    assert since is not None
    assert since.timestamp() <= truth[20]


def test_a_head_timestamp_that_failed_is_not_asked_for_again(tmp_path: Path) -> None:
    """The window that asked for it fails, the others are settled by probes."""

    class Headless(FakeHistory):
        def find_head(self, instrument: Instrument, call: Call | None = None) -> datetime | None:
            super().find_head(instrument)
            raise TransientError("no answer")

    store = Store(tmp_path)
    history = Headless(expected_bars(AAPL, window("2024-04-10", "2024-05-01")).opens)
    report = load(store, history)
    assert history.heads_asked == 1
    assert len(report.failures) == 1
    assert report.segments_fetched > 0
    assert held(store) == history.truth.tolist()


def remove_files(store: Store) -> None:
    store.csv_path(AAPL).unlink()
    store.sidecar_path(AAPL).unlink()


def test_nothing_is_claimed_of_a_file_that_is_gone_with_its_sidecar(tmp_path: Path) -> None:
    """Without the sidecar nothing shows that bars are gone; what was verified was verified on another file."""
    store = Store(tmp_path)
    truth = expected_bars(AAPL, JANUARY).opens
    history = FakeHistory(np.delete(truth, np.arange(20, 30)))

    def remove(raw: RawBars) -> RawBars:
        remove_files(store)
        return pick(raw, raw.opens_s >= truth[10])

    history.script = {2: remove}
    report = load(store, history, JANUARY)
    assert len(history.requests) >= 2
    assert [type(failure.error) for failure in report.failures] == [DataError]
    assert store.read_sidecar(AAPL).answered == ()
    history.script = {}
    load(store, history, JANUARY)
    assert held(store) == history.truth.tolist()


def test_bars_that_are_taken_away_while_the_load_connects_are_missed(tmp_path: Path) -> None:
    """The plan was made with them. A cut answer for a window that contained them is not complete."""
    store = Store(tmp_path)
    truth = expected_bars(AAPL, JANUARY).opens
    load(store, FakeHistory(truth), window("2024-01-08", "2024-01-10"))
    taken = np.asarray(held(store)[3:6])

    class Slow(FakeHistory):
        def pin(self, instrument: Instrument, call: Call | None = None) -> Instrument:
            lines = store.csv_path(AAPL).read_bytes().splitlines(keepends=True)
            store.csv_path(AAPL).write_bytes(b"".join(lines[:4] + lines[7:]))
            return super().pin(instrument)

    history = Slow(truth)
    history.script = {1: lambda raw: pick(raw, ~np.isin(raw.opens_s, taken))}
    load(store, history, JANUARY)
    assert len(history.requests) == 2
    assert held(store) == truth.tolist()


def test_a_clock_that_is_disproved_in_the_middle_of_a_window_leaves_later_bars_missing(tmp_path: Path) -> None:
    """Bars that were forming by the gateway's clock, until it sent one that opens later: probes look around them too."""
    series = Series(forex("EURUSD"), TIMEFRAMES["1m"])
    span = window("2024-06-12T08:00:00", "2024-06-12T12:00:00")
    now = utc("2024-06-12T12:00:00")
    truth = expected_bars(series, span).opens
    history = FakeHistory(np.delete(truth, np.arange(200, 230)), clock_lag_s=4000.0)
    store = Store(tmp_path)
    report = load(store, history, span, series, now)
    assert any("ignored" in notice for notice in report.notices)
    assert held(store, series) == history.truth.tolist()
    assert report.missing_bars + report.proven_empty == 30


@pytest.mark.parametrize("error", [None, StoreError("the disk is full")], ids=["no error", "full disk"])
def test_a_first_request_that_is_the_newest_does_not_confuse_the_load(tmp_path: Path, error: StoreError | None) -> None:
    """The request that compares price scales comes first. Here it is the newest: the held bars follow the gap, and the file was
    not written for days."""
    series = Series(stock("AAPL"), TIMEFRAMES["5m"])
    span = window("2024-05-20", "2024-06-03")
    store, now = Store(tmp_path), utc("2024-06-10T14:00:00")
    history = FakeHistory.of(series, span)
    load(store, history, window("2024-05-28T13:30:00", "2024-05-29T18:30:00"), series, now)
    history.requests.clear()
    history.script = {} if error is None else {1: error}
    report = load(store, history, span, series, now)
    starts = [request.window.start for request in history.requests]
    if error is None:
        assert starts[0] > starts[1]
        assert held(store, series) == history.truth.tolist()
    else:
        (failure,) = report.failures
        assert failure.window.start < starts[0]
        assert failure.window.end >= utc("2024-05-31T20:00:00")
