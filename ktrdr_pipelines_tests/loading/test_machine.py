"""The load machine and its driver: order of requests, several loads in turn, broken-off loads, what a load costs the store."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktrdr_pipelines.bars import schema
from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.errors import BugError, GatewayUnreachable, RequestTimeout
from ktrdr_pipelines.loading.actions import Answered, Ask, Begin, Begun, Refused, Remember, Report, Stored, Write
from ktrdr_pipelines.loading.driver import Load, drive
from ktrdr_pipelines.loading.knowledge import NOTHING_HELD, Knowledge
from ktrdr_pipelines.loading.machine import LoadMachine
from ktrdr_pipelines.loading.report import Completed, Failure, Fetched, LoadReport, Planned
from ktrdr_pipelines.store.sidecar import Sidecar
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import FakeHistory, raw_bars, utc, window

AAPL = Series(stock("AAPL"), TIMEFRAMES["1h"])
MSFT = Series(stock("MSFT"), TIMEFRAMES["1h"])
SPAN = window("2024-01-01", "2024-04-01")
NOW = utc("2024-06-15")


def make_machine(span: Window = SPAN) -> LoadMachine:
    known = Knowledge(AAPL.timeframe, NOTHING_HELD, Sidecar())
    return LoadMachine(AAPL, span, known, HistoryLimits.CLASSIC, now=NOW, report=LoadReport(AAPL, span))


def make_load(series: Series, store: Store, history: FakeHistory, span: Window = SPAN) -> Load:
    return Load(series, span, store=store, history=lambda: history, limits=HistoryLimits.CLASSIC, now=lambda: NOW)


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
    """Three asks at once, answered from the newest to the oldest: every partition is reported as complete."""
    machine = make_machine()
    machine.start()
    machine.begun(Begun(AAPL.instrument))
    asks = [action for _ in range(3) for action in machine.open_next()]
    assert [type(ask) for ask in asks] == [Ask] * 3
    assert machine.open_next() == []
    done: list[Any] = []
    for ask in reversed(asks):
        assert isinstance(ask, Ask)
        bars = raw_bars(expected_bars(AAPL, ask.request.window).opens)
        (write,) = machine.receive(ask.episode, Answered(bars, NOW))
        assert isinstance(write, Write)
        done += machine.receive(ask.episode, Stored(len(write.bars)))
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
    history.fetch = lambda series, request: (asked.append(series.name), fetch(series, request))[1]  # type: ignore[method-assign]
    loads = [make_load(AAPL, store, history), make_load(MSFT, store, history)]
    events = list(drive(loads))
    assert asked == ["AAPL_1h", "MSFT_1h"] * 3
    assert [load.report.status for load in loads] == ["success", "partial"]
    assert [load.report.ib_requests_made for load in loads] == [3, 3]
    assert len([event for event in events if isinstance(event, Failure)]) == 1
    assert opens_of(store.read_bars(AAPL)).tolist() == history.truth.tolist()


def test_a_load_that_is_broken_off_remembers_what_it_owes(tmp_path: Path) -> None:
    """Left after its first request, as Ctrl-C leaves it: the next tail begins where this one stopped."""
    store = Store(tmp_path)
    history = FakeHistory.of(AAPL, SPAN)
    run = make_load(AAPL, store, history).run()
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
    list(load.run())
    assert (len(history.requests), load.report.status) == (12, "success")
    assert calls["write"] == calls["validations"] == 12
    assert sum(calls[name] for name in ("extent", "held_opens", "read_sidecar", "read_bars")) <= 5
