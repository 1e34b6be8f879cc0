"""The driver with several requests out at once: how many, whose, what is shown, and how it ends. Threads, no sockets."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.calls import QUIET_S, Call, Interrupted, Waiting
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.errors import GatewayUnreachable, RequestTimeout
from ktrdr_pipelines.loading.driver import drive
from ktrdr_pipelines.loading.report import Ended, Event, Failure, Fetched
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.planning.requests import Request
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import FakeHistory, utc, window

SPAN = window("2024-01-01", "2025-01-01")
NOW = utc("2025-06-15")
SYMBOLS = ("AAPL", "MSFT", "GOOG", "AMZN", "META", "NVDA", "TSLA", "INTC")


def series_of(symbol: str) -> Series:
    return Series(stock(symbol), TIMEFRAMES["1h"])


@dataclass
class HeldHistory(FakeHistory):
    """Keeps requests open until `release`, or until it is interrupted. ``open_now``: those that are out, by series name."""

    open_now: Counter[str] = field(default_factory=Counter)
    most_open: int = 0
    of_each: list[str] = field(default_factory=list)
    classes: list[WorkClass] = field(default_factory=list)
    before: Callable[[Series, Request, Call], None] = lambda _series, _request, _call: None
    interruptions: int = 0

    def __post_init__(self) -> None:
        self.changed = threading.Condition()
        self.answered_until = utc("2000-01-01")
        self.is_interrupted = False

    def release(self, until: str = "2030-01-01") -> None:
        """Answer requests for windows that begin before ``until``."""
        with self.changed:
            self.answered_until = utc(until)
            self.changed.notify_all()

    def wait_until_open(self, requests: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.open_now.total() == requests, 20), self.open_now

    def interrupt(self) -> None:
        with self.changed:
            self.is_interrupted = True
            self.interruptions += 1
            self.changed.notify_all()

    def resume(self) -> None:
        self.is_interrupted = False

    def fetch(self, series: Series, request: Request, call: Call | None = None) -> Any:
        assert call is not None
        with self.changed:
            self.open_now[series.name] += 1
            self.of_each.append(series.name)
            self.classes.append(call.work)
            self.most_open = max(self.most_open, self.open_now.total())
            self.changed.notify_all()
        self.before(series, request, call)
        with self.changed:
            try:
                assert self.changed.wait_for(
                    lambda: request.window.start < self.answered_until or self.is_interrupted, 30
                )
                if self.is_interrupted:
                    raise Interrupted
                return super().fetch(series, request, call)
            finally:
                self.open_now[series.name] -= 1
                self.changed.notify_all()


def make_loads(history: FakeHistory, where: Path, symbols: tuple[str, ...] = ("AAPL",)) -> list[Load]:
    return [
        Load(
            series_of(symbol),
            SPAN,
            store=Store(where),
            history=lambda: history,
            limits=HistoryLimits.CLASSIC,
            now=lambda: NOW,
        )
        for symbol in symbols
    ]


class Background:
    """Drives loads in a thread, so that the test can look at what is out meanwhile."""

    def __init__(self, loads: list[Load], open_requests: int) -> None:
        self.events: list[tuple[Load, Event]] = []
        self.waits: list[tuple[str, Waiting]] = []
        self._loads, self._open_requests = loads, open_requests
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        def show(load: Load, waiting: Waiting) -> None:
            self.waits.append((load.series.name, waiting))

        for each in drive(self._loads, open_requests=self._open_requests, on_wait=show):
            self.events.append(each)

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def history() -> HeldHistory:
    return HeldHistory(expected_bars(series_of("AAPL"), SPAN).opens)


def test_requests_of_one_series_overlap_up_to_the_limit(history: HeldHistory, tmp_path: Path) -> None:
    """After the first, which may show where history starts, four at a time; every bar arrives, each partition once."""
    load = make_loads(history, tmp_path)
    running = Background(load, 4)
    history.wait_until_open(1)
    history.release("2024-01-15")
    history.wait_until_open(4)
    history.release()
    running.join()
    assert history.most_open == 4
    assert len(history.requests) == 12
    assert opens_of(Store(tmp_path).read_bars(series_of("AAPL"))).tolist() == history.truth.tolist()
    done = [event.done for _, event in running.events if isinstance(event, Fetched)]
    assert done == list(range(1, 13))
    assert load[0].report.ib_requests_made == 12


def test_several_series_share_the_requests_in_turn(history: HeldHistory, tmp_path: Path) -> None:
    """Eight series of twelve requests, six at once: never two of one series before each has one, so that the rule for one
    contract does not hold them up."""
    running = Background(make_loads(history, tmp_path, SYMBOLS), 6)
    history.wait_until_open(6)
    assert max(history.open_now.values()) == 1
    history.release()
    running.join()
    assert history.most_open == 6
    assert Counter(history.of_each) == dict.fromkeys((f"{symbol}_1h" for symbol in SYMBOLS), 12)
    ended = [load.series.name for load, event in running.events if isinstance(event, Ended)]
    assert sorted(ended) == sorted(f"{symbol}_1h" for symbol in SYMBOLS)


def test_a_failure_of_one_series_does_not_concern_the_others(history: HeldHistory, tmp_path: Path) -> None:
    def refuse(series: Series, _request: Request, _call: Call) -> None:
        if series.name == "MSFT_1h":
            raise GatewayUnreachable("gone")

    history.before = refuse
    loads = make_loads(history, tmp_path, ("AAPL", "MSFT", "GOOG"))
    history.release()
    running = Background(loads, 6)
    running.join()
    assert [load.report.status for load in loads] == ["success", "failed", "success"]
    assert [load.series.name for load, event in running.events if isinstance(event, Failure)] == ["MSFT_1h"]


def test_a_time_out_of_one_of_six_open_requests_costs_its_window_only(history: HeldHistory, tmp_path: Path) -> None:
    history.script[4] = RequestTimeout("no answer within 120 s")
    history.release()
    (load,) = loads = make_loads(history, tmp_path)
    Background(loads, 6).join()
    assert (load.report.status, len(load.report.failures)) == ("partial", 1)
    window_lost = load.report.failures[0].window
    held = opens_of(Store(tmp_path).read_bars(load.series))
    lost = history.truth[~np.isin(history.truth, held)]
    assert len(lost) == load.report.missing_bars > 100
    assert window_lost.start_s <= lost[0]
    assert lost[-1] < window_lost.end_s


@pytest.mark.parametrize("how", ["left", "interrupted"])
def test_loads_that_are_broken_off_end_their_requests_and_keep_what_was_answered(
    history: HeldHistory, tmp_path: Path, how: str
) -> None:
    """With six requests out: they are interrupted, within seconds; what was answered before is in the file."""
    history.release("2024-03-15")
    loads = make_loads(history, tmp_path)
    begun_s = time.monotonic()
    with closing(drive(loads, open_requests=6)) as events:
        done = 0
        while done < 3:
            _, event = next(events)
            done += isinstance(event, Fetched)
        if how == "interrupted":
            history.wait_until_open(5)
            with pytest.raises(KeyboardInterrupt):
                events.throw(KeyboardInterrupt)
    assert time.monotonic() - begun_s < 20
    assert history.interruptions >= 1
    history.wait_until_open(0)
    store = Store(tmp_path)
    assert len(store.read_bars(loads[0].series)) > 400
    assert loads[0].lock.try_acquire() == ""
    loads[0].lock.release()
    history.release()
    list(drive(make_loads(history, tmp_path), open_requests=6))
    assert opens_of(store.read_bars(loads[0].series)).tolist() == history.truth.tolist()


def test_waits_are_shown_with_their_load(history: HeldHistory, tmp_path: Path) -> None:
    """A long wait at once; a short one not at all; an answer that does not come, after two seconds, with its time-out."""
    until = NOW + timedelta(minutes=5)

    def wait(series: Series, _request: Request, call: Call) -> None:
        if series.name == "AAPL_1h":
            call.on_wait(Waiting("pacing: a short rule", 1.0, until))
            call.on_wait(Waiting("pacing: 60 requests in 10 minutes", 300.0, until))
        else:
            call.on_sent(120.0)

    history.before = wait
    running = Background(make_loads(history, tmp_path, ("MSFT",)), 6)
    deadline = time.monotonic() + 4 * QUIET_S
    while not running.waits:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ((name, waiting),) = running.waits
    assert (name, "1 request open" in waiting.reason) == ("MSFT_1h", True)
    assert 110 < waiting.seconds < 120
    history.release()
    running.join()
    paced = Background(make_loads(history, tmp_path, ("AAPL",)), 6)
    paced.join()
    assert {waiting.reason for _, waiting in paced.waits} == {"pacing: 60 requests in 10 minutes"}
    assert {waiting.until for _, waiting in paced.waits} == {until}


def test_the_class_of_a_request_is_that_of_the_work(history: HeldHistory, tmp_path: Path) -> None:
    """Twelve requests are a backfill; then two bars at the end are a tail. Many small loads together are a backfill too."""
    history.release()
    list(drive(make_loads(history, tmp_path), open_requests=2))
    assert set(history.classes) == {WorkClass.BACKFILL}
    history.classes.clear()
    series = series_of("AAPL")
    tail = window("2024-01-01", "2025-01-04")
    history.truth = expected_bars(series, tail).opens
    store = Store(tmp_path)
    load = Load(series, tail, store=store, history=lambda: history, limits=HistoryLimits.CLASSIC, now=lambda: NOW)
    list(drive([load], open_requests=2))
    assert history.classes == [WorkClass.TAIL]
    history.classes.clear()
    small = window("2024-02-01", "2024-04-01")
    loads = [
        Load(
            series_of(each), small, store=store, history=lambda: history, limits=HistoryLimits.CLASSIC, now=lambda: NOW
        )
        for each in SYMBOLS[1:]
    ]
    list(drive(loads, open_requests=2))
    assert Counter(history.classes) == {WorkClass.INTERACTIVE: 10, WorkClass.BACKFILL: 4}


def test_a_load_that_is_interrupted_while_it_opens_frees_its_series(history: HeldHistory, tmp_path: Path) -> None:
    """Also where something still refers to the load, as a notebook's last traceback does."""

    def interrupt(_held: object, _now: object) -> Any:
        raise KeyboardInterrupt

    (load,) = make_loads(history, tmp_path)
    broken = Load(
        load.series, SPAN, store=Store(tmp_path), history=lambda: history, limits=HistoryLimits.CLASSIC,
        now=lambda: NOW, resolve=interrupt,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        list(drive([broken], open_requests=6))
    assert load.lock.try_acquire() == ""
    load.lock.release()


def test_waits_of_open_requests_that_overlap_count_once(history: HeldHistory, tmp_path: Path) -> None:
    """Six requests that wait for the same minute are a minute of the load, and so are their retries."""

    def wait(_series: Series, _request: Request, call: Call) -> None:
        call.costs.paced.append((1000.0, 1060.0))
        call.costs.retried.append((1060.0, 1075.0))

    history.before = wait
    history.release()
    (load,) = loads = make_loads(history, tmp_path)
    list(drive(loads, open_requests=6))
    assert load.report.ib_requests_made == 12
    assert (load.report.pacing_wait_s, load.report.retry_wait_s) == (60.0, 15.0)
