"""The load machine and its driver: order of requests, several loads in turn, broken-off loads, what a load costs the store."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktrdr_pipelines.bars import schema
from ktrdr_pipelines.bars.restatement import ScaleChanged
from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.errors import BugError, GatewayUnreachable, RequestTimeout
from ktrdr_pipelines.loading.actions import (
    Action,
    Answered,
    Ask,
    Begin,
    Begun,
    Refused,
    Remember,
    Report,
    Stored,
    Write,
)
from ktrdr_pipelines.loading.driver import drive
from ktrdr_pipelines.loading.knowledge import NOTHING_HELD, Knowledge
from ktrdr_pipelines.loading.machine import LoadMachine
from ktrdr_pipelines.loading.report import Completed, Failure, Fetched, LoadReport, Planned
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.store.sidecar import Sidecar
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import FakeHistory, raw_bars, run_load, utc, window

AAPL = Series(stock("AAPL"), TIMEFRAMES["1h"])
MSFT = Series(stock("MSFT"), TIMEFRAMES["1h"])
SPAN = window("2024-01-01", "2024-04-01")
NOW = utc("2024-06-15")


def make_machine(span: Window = SPAN) -> LoadMachine:
    known = Knowledge(AAPL.timeframe, NOTHING_HELD, Sidecar())
    return LoadMachine(AAPL, span, known, HistoryLimits.CLASSIC, now=NOW, report=LoadReport(AAPL, span))


def make_load(series: Series, store: Store, history: FakeHistory, span: Window = SPAN) -> Load:
    return Load(series, span, store=store, history=lambda: history, limits=HistoryLimits.CLASSIC, now=lambda: NOW)


def answer(ask: Action) -> tuple[int, Answered]:
    """The right answer, as arguments of `LoadMachine.receive`."""
    assert isinstance(ask, Ask)
    return ask.episode, Answered(raw_bars(expected_bars(AAPL, ask.request.window).opens), NOW)


def store_all(machine: LoadMachine, actions: list[Action]) -> list[Action]:
    """Accept every write that ``actions`` lead to; the actions that are left."""
    done: list[Action] = []
    queue = list(actions)
    while queue:
        action = queue.pop(0)
        if isinstance(action, Write):
            queue += machine.receive(action.episode, Stored(len(action.bars)))
        else:
            done.append(action)
    return done


def test_a_failure_of_all_requests_ends_the_open_ones_but_keeps_what_is_answered() -> None:
    """The gateway is lost with several requests open: one failure that names them all, and the answered bars are written."""
    machine = make_machine(window("2024-01-01", "2024-06-01"))
    machine.start()
    machine.begun(Begun(AAPL.instrument))
    (first,) = machine.open_next()
    store_all(machine, machine.receive(*answer(first)))
    second, third, fourth = (action for _ in range(3) for action in machine.open_next())
    assert isinstance(second, Ask)
    assert isinstance(fourth, Ask)
    assert machine.receive(*answer(third)) == []
    left = store_all(machine, machine.receive(second.episode, Refused(GatewayUnreachable("gone"))))
    failures = [action.event for action in left if isinstance(action, Report) and isinstance(action.event, Failure)]
    (failure,) = failures
    assert failure.window.contains(utc("2024-02-02"))
    assert failure.window.contains(utc("2024-05-30"))
    assert machine.report.segments_fetched == 2
    assert machine.receive(fourth.episode, Refused(GatewayUnreachable("gone"))) == []
    assert machine.open_next() == []
    assert machine.is_over
    assert machine.report.missing_bars == 0
    machine.finish()
    assert (machine.report.status, len(machine.report.failures)) == ("partial", 1)


def test_bars_on_another_price_scale_end_all_open_requests() -> None:
    """Nothing of this load is written after a restatement was noticed, not even what is answered."""
    machine = make_machine(window("2024-01-01", "2024-06-01"))
    machine.start()
    machine.begun(Begun(AAPL.instrument))
    (first,) = machine.open_next()
    store_all(machine, machine.receive(*answer(first)))
    second, third = (action for _ in range(2) for action in machine.open_next())
    assert machine.receive(*answer(third)) == []
    (write,) = machine.receive(*answer(second))
    assert isinstance(write, Write)
    left = machine.receive(write.episode, Refused(ScaleChanged("another scale")))
    assert [type(action) for action in left] == [Report]
    assert machine.open_next() == []
    assert machine.is_over


def test_the_first_actions_are_the_plan() -> None:
    """Nothing is asked before `Begin` has succeeded: that is what a dry run shows."""
    machine = make_machine()
    plan, begin = machine.start()
    assert isinstance(plan, Report)
    assert isinstance(plan.event, Planned)
    assert len(plan.event.requests) == len(machine.plan.requests) == 3
    assert begin == Begin(machine.plan.requests[0].window.start, None)
    assert machine.open_next() == []


def test_a_gateway_that_cannot_be_reached_fails_the_whole_window() -> None:
    machine = make_machine()
    machine.start()
    (report,) = machine.begun(Refused(GatewayUnreachable("nothing listens")))
    assert isinstance(report, Report)
    assert isinstance(report.event, Failure)
    assert machine.open_next() == []
    assert (machine.finish(), machine.report.status) == ([], "failed")


def test_requests_can_be_open_together() -> None:
    """The first one alone, since it may show where history starts; then all at once. They are answered from the newest to the
    oldest and written from the oldest to the newest, and every partition is reported as complete."""
    machine = make_machine()
    machine.start()
    machine.begun(Begun(AAPL.instrument))
    (first,) = machine.open_next()
    assert machine.open_next() == []
    done = store_all(machine, machine.receive(*answer(first)))
    second, third = (action for _ in range(2) for action in machine.open_next())
    assert machine.open_next() == []
    assert machine.receive(*answer(third)) == []
    actions = machine.receive(*answer(second))
    assert [action.episode for action in actions if isinstance(action, Write)] == [2]
    done += store_all(machine, actions)
    assert machine.open_next() == []
    assert machine.is_over
    events = [action.event for action in done if isinstance(action, Report)]
    assert [event.done for event in events if isinstance(event, Fetched)] == [1, 2, 3]
    assert {event.partition.key for event in events if isinstance(event, Completed)} == {
        "2024-01-01",
        "2024-02-01",
        "2024-03-01",
    }
    assert machine.finish() == [Remember(None, None)]
    assert machine.report.status == "success"


def test_an_input_for_an_episode_that_is_not_open_is_a_bug() -> None:
    machine = make_machine()
    machine.start()
    with pytest.raises(BugError):
        machine.receive(7, Answered(raw_bars(np.empty(0, np.int64)), NOW))


def test_a_driver_runs_several_loads_in_turn(tmp_path: Path) -> None:
    """Request by request over one history; a failure of the one does not concern the other, nor do its counts."""
    store = Store(tmp_path)
    history = FakeHistory.of(AAPL, SPAN, script={2: RequestTimeout("no answer within 120 s")})
    asked: list[str] = []
    fetch = history.fetch
    history.fetch = lambda series, request, call: (asked.append(series.name), fetch(series, request, call))[1]  # type: ignore[method-assign]
    loads = [make_load(AAPL, store, history), make_load(MSFT, store, history)]
    events = list(drive(loads))
    assert asked == ["AAPL_1h", "MSFT_1h"] * 3
    assert [load.report.status for load in loads] == ["success", "partial"]
    assert [load.report.ib_requests_made for load in loads] == [3, 3]
    assert len([event for _, event in events if isinstance(event, Failure)]) == 1
    assert opens_of(store.read_bars(AAPL)).tolist() == history.truth.tolist()


def test_a_load_that_is_broken_off_remembers_what_it_owes(tmp_path: Path) -> None:
    """Left after its first request, as Ctrl-C leaves it: the next tail begins where this one stopped."""
    store = Store(tmp_path)
    history = FakeHistory.of(AAPL, SPAN)
    run = run_load(make_load(AAPL, store, history))
    for event in run:
        if isinstance(event, Fetched):
            break
    run.close()  # type: ignore[attr-defined]
    assert len(history.requests) == 1
    extent, since = store.extent(AAPL), store.read_sidecar(AAPL).unfinished_from
    assert extent is not None
    assert since is None or since <= extent.last


def test_a_load_costs_the_store_one_write_a_request_and_a_handful_of_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve requests without a gap: each bar is validated once, what is held is read once."""
    calls: Counter[str] = Counter()
    validate = schema.bar_schema

    class CountingStore(Store):
        def __getattribute__(self, name: str) -> Any:
            if name in ("write", "extent", "held_opens", "read_sidecar", "read_bars"):
                calls[name] += 1
            return super().__getattribute__(name)

    def counted(*arguments: Any, **more: Any) -> Any:
        calls["validations"] += 1
        return validate(*arguments, **more)

    monkeypatch.setattr(schema, "bar_schema", counted)
    span = window("2023-01-01", "2024-01-01")
    history = FakeHistory.of(AAPL, span)
    load = make_load(AAPL, CountingStore(tmp_path), history, span)
    list(run_load(load))
    assert (len(history.requests), load.report.status) == (12, "success")
    assert calls["write"] == calls["validations"] == 12
    assert sum(calls[name] for name in ("extent", "held_opens", "read_sidecar", "read_bars")) <= 5
