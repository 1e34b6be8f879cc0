"""Promises of the tail sensor and the schedules: what is due is requested once, in one run, and each skip has its reason.

Real Dagster instances and files; the clock is passed in. Runs that a tick asks for are really executed at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
import time_machine

from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.definitions import build_defs
from ktrdr_pipelines.domain.instruments import Instrument, Series, forex, stock
from ktrdr_pipelines.domain.partitions import partition_at, partition_from_key, partitions_in
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.orchestration.assets import asset_key, op_name
from ktrdr_pipelines.orchestration.automation.due import Due, HeldEnds, Tails
from ktrdr_pipelines.orchestration.automation.request_cost import Cost
from ktrdr_pipelines.orchestration.automation.run_requests import MAX_PARTITIONS
from ktrdr_pipelines.orchestration.automation.schedules import make_tail_schedules
from ktrdr_pipelines.orchestration.automation.sensors import make_tail_sensor
from ktrdr_pipelines.orchestration.automation.tail import (
    Attempt,
    TailTick,
    Tried,
    decide_tail,
    group_due,
    read_cursor,
    write_cursor,
)
from ktrdr_pipelines.orchestration.runs.queries import ActiveRuns, find_active_runs
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.sidecar import ProvenEmpty
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.conftest import StartGateway
from ktrdr_pipelines_tests.fakes import utc
from ktrdr_pipelines_tests.holding import execute, hold, partition_range, partition_statuses

MakeSettings = Callable[..., Settings]

AAPL_1M, AAPL_1H, AAPL_1D = (Series(stock("AAPL"), TIMEFRAMES[name]) for name in ("1m", "1h", "1d"))
MSFT_1H = Series(stock("MSFT"), TIMEFRAMES["1h"])
EURO_1H = Series(forex("EURUSD"), TIMEFRAMES["1h"])
MARCH = utc("2024-03-01")
TUESDAY = utc("2024-03-05T16:00:00")  # 11:00 in New York
NO_RUNS = ActiveRuns({})


@pytest.fixture
def offline(make_settings: MakeSettings) -> Settings:
    """Settings for ticks, which need no gateway."""
    return make_settings(4001)


def tick(settings: Settings, universe: list[Series], now: datetime, **more: object) -> TailTick:
    return decide_tail(settings, universe, HeldEnds(settings.data_dir), NO_RUNS, now, **more)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- what is due


def test_a_series_without_a_file_is_not_due_and_the_reason_says_so(offline: Settings) -> None:
    """The user decides on the first load."""
    found = tick(offline, [AAPL_1H], TUESDAY)
    assert found.requests == []
    assert found.reasons == ["1h: 1 series need a first load"]


def test_a_complete_tail_asks_for_nothing_until_the_next_bar(offline: Settings) -> None:
    """On a Saturday the reason names the moment on Monday when the first half-hour bar is complete and settled."""
    saturday = utc("2024-03-09T12:00:00")
    hold(offline.data_dir, AAPL_1H, MARCH, saturday)
    found = tick(offline, [AAPL_1H], saturday)
    assert found.requests == []
    assert found.reasons == ["1h: market closed and tail complete until 2024-03-11T14:00:10Z"]


def test_a_complete_tail_in_an_open_market_says_that_it_is_open(offline: Settings) -> None:
    """Between two bars there is nothing to ask either."""
    hold(offline.data_dir, AAPL_1H, MARCH, TUESDAY)
    found = tick(offline, [AAPL_1H], TUESDAY + timedelta(minutes=30))
    assert found.reasons == ["1h: market open and tail complete until 2024-03-05T17:00:10Z"]


def test_an_expired_future_is_never_due_again_while_its_successor_is(offline: Settings) -> None:
    """They trade by one calendar; what is known of one must not be taken for the other."""
    expired, successor = (
        Series(Instrument(name, "FUT", "CME", "USD", ib_symbol="ES", expiry=expiry), TIMEFRAMES["1h"])
        for name, expiry in (("ESZ3", "20231215"), ("ESM4", "20240621"))
    )
    hold(offline.data_dir, expired, utc("2023-12-01"), utc("2023-12-23"))
    hold(offline.data_dir, successor, MARCH, utc("2024-03-05"))
    (request,) = tick(offline, [expired, successor], TUESDAY).requests
    assert request.asset_selection == [asset_key(successor)]
    assert tick(offline, [expired], TUESDAY).reasons == ["1h: all have expired and are complete"]


@pytest.mark.parametrize(("late_s", "requests"), [(0, 0), (9, 0), (10, 1), (299, 1)])
def test_a_bar_is_due_ten_seconds_after_its_close(offline: Settings, late_s: int, requests: int) -> None:
    """IB gets a moment to finish a bar."""
    hold(offline.data_dir, AAPL_1H, MARCH, TUESDAY)
    found = tick(offline, [AAPL_1H], TUESDAY + timedelta(hours=1, seconds=late_s))
    assert len(found.requests) == requests


def test_a_daily_bar_is_due_after_the_settlement_delay(offline: Settings, make_settings: MakeSettings) -> None:
    """Half an hour after the close by default, or as the setting says."""
    hold(offline.data_dir, AAPL_1D, utc("2024-01-01"), utc("2024-03-05T12:00:00"))
    close = utc("2024-03-05T21:00:00")
    assert tick(offline, [AAPL_1D], close + timedelta(minutes=29)).requests == []
    assert len(tick(offline, [AAPL_1D], close + timedelta(minutes=30)).requests) == 1
    assert tick(make_settings(4001, settlement_delay_min=90), [AAPL_1D], close + timedelta(minutes=89)).requests == []


@pytest.mark.parametrize(
    ("name", "held", "before", "after"),
    [
        ("1w", "2024-03-01", "2024-03-08T21:29:00", "2024-03-08T21:30:00"),
        ("1w", "2024-02-26", "2024-03-08T21:29:00", "2024-03-08T21:30:00"),  # a week labelled with its Monday
        ("1mo", "2024-02-29", "2024-03-28T20:29:00", "2024-03-28T20:30:00"),  # Good Friday is the 29th
        ("1mo", "2024-02-01", "2024-03-28T20:29:00", "2024-03-28T20:30:00"),
    ],
)
def test_weeks_and_months_are_due_when_their_last_session_has_settled(
    offline: Settings, name: str, held: str, before: str, after: str
) -> None:
    """Whichever day the held bar is labelled with, the forming one is never asked for."""
    series = Series(stock("AAPL"), TIMEFRAMES[name])
    offline.data_dir.mkdir()
    row = f"{held}T00:00:00Z,1.0,1.0,1.0,1.0,1.0\n"
    (offline.data_dir / f"{series.name}.csv").write_text("timestamp,open,high,low,close,volume\n" + row)
    assert tick(offline, [series], utc(before)).requests == []
    assert len(tick(offline, [series], utc(after)).requests) == 1


def test_a_bar_that_was_proven_empty_is_not_due(offline: Settings) -> None:
    """What IB showed not to exist is never asked for again."""
    hold(offline.data_dir, AAPL_1H, MARCH, TUESDAY)
    later = TUESDAY + timedelta(hours=1, seconds=30)
    assert len(tick(offline, [AAPL_1H], later).requests) == 1
    Store(offline.data_dir).write(
        AAPL_1H,
        Store(offline.data_dir).read_bars(AAPL_1H, Window(MARCH, MARCH)),
        answered=None,
        source="simulator",
        now=later,
        proven_empty=[ProvenEmpty(start=TUESDAY, end=TUESDAY + timedelta(hours=1), opens=1)],
        complete_until=TUESDAY + timedelta(hours=1),
    )
    assert tick(offline, [AAPL_1H], later).requests == []


def test_a_sidecar_older_than_the_bar_is_not_read(offline: Settings) -> None:
    """It cannot know that the bar does not exist; one that was written later is read, and says when it cannot be."""
    hold(offline.data_dir, AAPL_1H, MARCH, TUESDAY)
    path = offline.data_dir / "AAPL_1h.meta.json"
    path.write_text("no sidecar")
    os.utime(path, (TUESDAY.timestamp(),) * 2)
    later = TUESDAY + timedelta(hours=2)
    assert len(tick(offline, [AAPL_1H], later).requests) == 1
    os.utime(path, (later.timestamp(),) * 2)
    assert "is unreadable" in tick(offline, [AAPL_1H], later).problems[0]


def test_a_file_of_another_program_is_adopted_aloud_once_it_is_whole(offline: Settings) -> None:
    """While it may still be being copied it is not touched; then it is adopted, which is reported, and its tail is due."""
    offline.data_dir.mkdir()
    path = offline.data_dir / "AAPL_1h.csv"
    path.write_text("date,open,high,low,close,volume\n2024-03-05 15:00:00+00:00,1,1,1,1,1\n")
    later = TUESDAY + timedelta(hours=2)
    os.utime(path, (later.timestamp() - 5,) * 2)
    before = path.read_bytes()
    assert tick(offline, [AAPL_1H], later).requests == []
    assert path.read_bytes() == before
    found = tick(offline, [AAPL_1H], later + timedelta(minutes=5))
    assert len(found.requests) == 1
    assert "1 rows, 0 refused" in found.notices[0]


def test_a_hole_inside_the_file_is_not_the_tails_business(offline: Settings) -> None:
    """Only bars after the last held one count."""
    hold(offline.data_dir, AAPL_1H, MARCH, TUESDAY, without=[3, 4])
    assert tick(offline, [AAPL_1H], TUESDAY + timedelta(seconds=30)).requests == []


def test_short_bars_are_asked_for_within_six_months_only(make_settings: MakeSettings) -> None:
    """After a year away a series of 30-second bars begins where IB still has them."""
    series = Series(stock("AAPL"), TIMEFRAMES["30s"])
    settings = make_settings(4001, auto_requests=300)
    hold(settings.data_dir, series, utc("2024-01-02"), utc("2024-01-03"))
    (request,) = tick(settings, [series], utc("2025-01-08T12:00:00")).requests
    assert partition_range(request) == ("2024-07-10", "2025-01-07")


def test_a_file_that_ends_before_the_partitions_begin_starts_with_them(make_settings: MakeSettings) -> None:
    """A partition that does not exist is never requested."""
    settings = make_settings(4001, partition_starts={"1h": "2024-03-01"})
    hold(settings.data_dir, AAPL_1H, utc("2024-01-10"), utc("2024-01-20"))
    (request,) = tick(settings, [AAPL_1H], utc("2024-04-02T20:00:30")).requests
    assert partition_range(request) == ("2024-03-01", "2024-04-01")


def test_a_file_that_cannot_be_read_does_not_stop_the_others(offline: Settings) -> None:
    """The others are asked for, the broken one is listed with its reason."""
    hold(offline.data_dir, AAPL_1H, MARCH, TUESDAY)
    (offline.data_dir / "MSFT_1h.csv").write_text("this is\nno bar file\n")
    found = tick(offline, [MSFT_1H, AAPL_1H], TUESDAY + timedelta(hours=2))
    assert [r.asset_selection for r in found.requests] == [[asset_key(AAPL_1H)]]
    (problem,) = found.problems
    assert problem.startswith("MSFT 1h: ")
    assert tick(offline, [MSFT_1H], TUESDAY).reasons == ["1h: 1 series cannot be read, see the log"]


def test_an_instrument_without_a_calendar_does_not_stop_the_others(offline: Settings) -> None:
    """It is listed; nothing is guessed."""
    odd = Series(replace(stock("ODD"), exchange="NOWHERE", currency="XXX"), TIMEFRAMES["1h"])
    for series in (AAPL_1H, odd):
        hold(offline.data_dir, AAPL_1H, MARCH, TUESDAY)
        if series is odd:
            (offline.data_dir / "ODD_1h.csv").write_bytes((offline.data_dir / "AAPL_1h.csv").read_bytes())
    found = tick(offline, [odd, AAPL_1H], TUESDAY + timedelta(hours=2))
    assert len(found.requests) == 1
    assert "no trading calendar" in found.problems[0]


# ---------------------------------------------------------------------------------------------------- one run for all


def test_one_run_holds_all_due_series_of_a_timeframe(offline: Settings) -> None:
    """From the partition of the oldest last bar to the newest, in mode tail; complete series are left out."""
    hold(offline.data_dir, AAPL_1H, utc("2024-01-02"), utc("2024-01-20"))
    hold(offline.data_dir, MSFT_1H, MARCH, utc("2024-03-04T22:00:00"))
    hold(offline.data_dir, EURO_1H, MARCH, TUESDAY)
    hold(offline.data_dir, AAPL_1M, MARCH, utc("2024-03-04T20:00:00"))
    found = tick(offline, [AAPL_1H, MSFT_1H, EURO_1H, AAPL_1M], TUESDAY + timedelta(seconds=20))
    minutes, hours = found.requests
    assert set(hours.asset_selection or ()) == {asset_key(AAPL_1H), asset_key(MSFT_1H)}
    assert partition_range(hours) == ("2024-01-01", "2024-03-01")
    assert hours.partition_key is None
    assert hours.tags["ktrdr/mode"] == "tail"
    assert hours.tags["ktrdr/origin"] == "sensor"
    assert {name: op["config"]["mode"] for name, op in hours.run_config["ops"].items()} == {
        op_name(AAPL_1H): "tail",
        op_name(MSFT_1H): "tail",
    }
    assert partition_range(minutes) == ("2024-03-04", "2024-03-05")


def test_a_single_partition_is_asked_for_by_its_key(offline: Settings) -> None:
    """A range of one is no range."""
    hold(offline.data_dir, AAPL_1H, MARCH, TUESDAY)
    (request,) = tick(offline, [AAPL_1H], TUESDAY + timedelta(hours=2)).requests
    assert request.partition_key == "2024-03-01"
    assert "dagster/asset_partition_range_start" not in request.tags


def make_due(symbol: str, held: str) -> Due:
    series = Series(stock(symbol), TIMEFRAMES["1m"])
    last = partition_at(series.timeframe, utc("2024-03-05"))
    first = partition_at(series.timeframe, utc(held))
    return Due(series, first, last, int(utc(held).timestamp()), int(TUESDAY.timestamp()), Cost(1))


def test_a_series_that_is_behind_does_not_slow_the_others_down() -> None:
    """One run while that is cheap; a run of its own for what would make Dagster plan thousands of idle partitions."""
    fresh = [make_due(f"S{i:02d}", "2024-03-04") for i in range(50)]
    assert len(group_due([*fresh, make_due("LATE", "2024-02-05")])) == 1
    runs = group_due([*fresh, make_due("LATE", "2014-02-05")])
    assert [len(run.due) for run in runs] == [50, 1]
    assert [run.first.key for run in runs] == ["2024-03-04", "2014-02-05"]


def test_runs_are_bounded_by_partitions_times_series() -> None:
    """50 series that are 60 days behind: no run has more than 2,000 partitions × series, and none is left out."""
    runs = group_due([make_due(f"S{i:02d}", "2023-12-12") for i in range(50)])
    sizes = [len(list(partitions_in(TIMEFRAMES["1m"], Window(r.first.window.start, r.last.window.end)))) for r in runs]
    assert [size * len(run.due) <= MAX_PARTITIONS for size, run in zip(sizes, runs, strict=True)] == [True, True]
    assert sum(len(run.due) for run in runs) == 50


def test_three_timeframes_of_forty_series_are_bounded(offline: Settings) -> None:
    """Two months away: a bounded run, or two, per timeframe; all series are in one, with the tags that order the queue."""
    universe = [Series(stock(f"S{i:02d}"), TIMEFRAMES[name]) for i in range(40) for name in ("1m", "1h", "1d")]
    for series in universe:
        hold(offline.data_dir, series, utc("2024-01-02"), utc("2024-01-04"))
    found = tick(offline, universe, TUESDAY)
    counts = [len(request.asset_selection or ()) for request in found.requests]
    assert sum(counts) == 120
    for request in found.requests:
        series_timeframe = TIMEFRAMES[request.tags["ktrdr/timeframe"]]
        first, last = (partition_from_key(series_timeframe, key).window for key in partition_range(request))
        size = len(list(partitions_in(series_timeframe, Window(first.start, last.end))))
        assert size * len(request.asset_selection or ()) <= MAX_PARTITIONS
        assert int(request.tags["dagster/priority"]) > 0
        assert request.tags["dagster/retry_on_asset_or_op_failure"] == "false"
        assert float(request.tags["dagster/max_runtime"]) >= 6 * 3600


# ---------------------------------------------------------------------------------------------------- what is too much


def test_one_partition_of_2020_does_not_load_everything_since(offline: Settings) -> None:
    """A user loaded one month in the UI. The tick starts nothing, and shows what is missing and the command that loads it."""
    hold(offline.data_dir, AAPL_1M, utc("2020-02-03"), utc("2020-02-04"))
    hold(offline.data_dir, AAPL_1H, utc("2018-02-01"), utc("2018-03-01"))
    found = tick(offline, [AAPL_1M, AAPL_1H], TUESDAY)
    assert found.requests == []
    assert found.attempts == {}
    minutes, hours = found.reasons
    assert "`ktrdr ib-load AAPL 1m --mode tail`" in minutes
    assert "2020-02-03T20:59:00Z" in minutes
    assert "about 1,0" in minutes  # four years of sessions
    assert "`ktrdr ib-load AAPL 1h --mode tail`" in hours
    assert "70 requests" in hours


@pytest.mark.parametrize(("bound", "requests"), [(69, 0), (70, 1)])
def test_the_bound_of_a_tail_is_a_setting(make_settings: MakeSettings, bound: int, requests: int) -> None:
    """Exactly as many requests as it allows are started."""
    settings = make_settings(4001, auto_requests=bound)
    hold(settings.data_dir, AAPL_1H, utc("2018-02-01"), utc("2018-03-01"))
    assert len(tick(settings, [AAPL_1H], TUESDAY).requests) == requests


def test_a_tail_that_is_too_long_is_shown_although_others_are_loaded(offline: Settings) -> None:
    """A run for one series does not hide that another one needs the user."""
    hold(offline.data_dir, AAPL_1H, utc("2010-02-01"), utc("2010-03-01"))
    hold(offline.data_dir, MSFT_1H, MARCH, utc("2024-03-04T22:00:00"))
    found = tick(offline, [AAPL_1H, MSFT_1H], TUESDAY)
    assert [r.asset_selection for r in found.requests] == [[asset_key(MSFT_1H)]]
    assert "`ktrdr ib-load AAPL 1h --mode tail`" in found.reasons[0]


@pytest.mark.parametrize(("name", "least", "most"), [("1m", 4_500, 5_200), ("1s", 540, 620), ("1h", 215, 240)])
def test_a_series_that_is_years_behind_is_judged_by_a_part(
    offline: Settings, name: str, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first part of what is missing is planned: the arrays of a whole series would not fit into a tick. Partitions of
    seconds begin with 2024."""
    spans: list[Window] = []

    def watch(series: Series, span: Window, **more: int) -> object:
        spans.append(span)
        return expected_bars(series, span, **more)

    monkeypatch.setattr("ktrdr_pipelines.orchestration.automation.due.expected_bars", watch)
    series = Series(stock("AAPL"), TIMEFRAMES[name])
    tails = Tails(offline, HeldEnds(offline.data_dir), TUESDAY)
    due = tails.find_due(series, int(utc("2005-02-03T20:59:00").timestamp()))
    assert due is not None
    assert not due.cost.is_exact
    assert least < due.cost.requests < most
    assert max(span.end - span.start for span in spans) < timedelta(days=130 if name != "1h" else 122 * 31)


def test_a_tick_whose_time_is_up_is_continued_by_the_next(offline: Settings) -> None:
    """Every series is judged once; what earlier ticks tried is kept for those that had no time."""
    universe = [Series(stock(name), TIMEFRAMES["1h"]) for name in ("A", "B", "C", "D")]
    for series in universe:
        hold(offline.data_dir, series, MARCH, TUESDAY)
    later = TUESDAY + timedelta(hours=2)
    tried = Tried({"C_1h": Attempt(1, 7, 5), "D_1h": Attempt(1, 7, 5)})
    times = iter([0.0, 0.0, 1000.0])
    first = tick(offline, universe, later, tried=tried, clock=lambda: next(times))
    assert [r.asset_selection for r in first.requests] == [[asset_key(universe[0]), asset_key(universe[1])]]
    assert first.continue_at == "C_1h"
    assert first.attempts["C_1h"].tries == 7
    second = tick(offline, universe, later, tried=read_cursor(write_cursor(first)))
    assert second.continue_at == ""
    assert set(second.requests[0].asset_selection or ()) == {asset_key(series) for series in universe[2:]}


# ---------------------------------------------------------------------------------------------------- once, and again


def test_a_tick_is_not_launched_twice_and_a_later_one_is_another_request(offline: Settings) -> None:
    """The same slot of five minutes gives the same run key, the next slot another."""
    hold(offline.data_dir, AAPL_1H, MARCH, TUESDAY)
    at = TUESDAY + timedelta(hours=1, seconds=20)
    keys = [
        tick(offline, [AAPL_1H], at + timedelta(seconds=later)).requests[0].run_key for later in (0, 0, 100, 300, 600)
    ]
    assert keys[0] == keys[1] == keys[2]
    assert len(set(keys)) == 3


def test_what_brings_nothing_is_tried_again_after_growing_waits(offline: Settings) -> None:
    """Ticks every five minutes while nothing arrives: tries after 5, 10, 20, 30, 30 minutes; progress starts anew."""
    hold(offline.data_dir, AAPL_1H, MARCH, TUESDAY)
    began = TUESDAY + timedelta(hours=1, seconds=20)
    left = Tried()
    tried = []
    for minutes in range(0, 150, 5):
        found = tick(offline, [AAPL_1H], began + timedelta(minutes=minutes), tried=left)
        left = read_cursor(write_cursor(found))
        if found.requests:
            tried.append(minutes)
        else:
            assert "brought nothing, the next one is at 2024-03-05T" in found.reasons[0]
    assert tried == [0, 5, 15, 35, 65, 95, 125]
    hold(offline.data_dir, AAPL_1H, MARCH, TUESDAY + timedelta(hours=1))
    found = tick(offline, [AAPL_1H], began + timedelta(minutes=150), tried=left)
    assert found.attempts["AAPL_1h"].tries == 1


@pytest.mark.parametrize(
    "cursor", [None, "", "garbage", "[1]", '{"attempts": {"AAPL_1h": 3}}', '{"AAPL_1h": [1, 2]}', "null"]
)
def test_a_cursor_that_is_not_ours_is_no_obstacle(cursor: str | None) -> None:
    """It means that nothing was tried."""
    assert read_cursor(cursor) == Tried()


def test_a_series_in_a_run_that_is_still_going_is_left_out(offline: Settings, instance: dg.DagsterInstance) -> None:
    """The run is named; others of the timeframe are asked for; when it has ended, the series is due again."""
    for series in (AAPL_1H, MSFT_1H):
        hold(offline.data_dir, series, MARCH, TUESDAY)
    job = build_defs(offline, [AAPL_1H, MSFT_1H]).resolve_implicit_global_asset_job_def()
    run = instance.create_run_for_job(
        job, status=dg.DagsterRunStatus.STARTED, asset_selection=frozenset([asset_key(AAPL_1H)])
    )
    later = TUESDAY + timedelta(hours=2)
    held = HeldEnds(offline.data_dir)
    active = find_active_runs(instance)
    found = decide_tail(offline, [AAPL_1H], held, active, later)
    assert found.requests == []
    assert found.reasons == [f"1h: in an unfinished run ({run.run_id})"]
    both = decide_tail(offline, [AAPL_1H, MSFT_1H], held, active, later)
    assert [r.asset_selection for r in both.requests] == [[asset_key(MSFT_1H)]]
    instance.report_run_failed(run)
    assert len(decide_tail(offline, [AAPL_1H], held, find_active_runs(instance), later).requests) == 1


def test_a_run_that_was_never_launched_does_not_block_for_ever(offline: Settings, instance: dg.DagsterInstance) -> None:
    """The process that created it an hour ago died before it launched it."""
    job = build_defs(offline, [AAPL_1H]).resolve_implicit_global_asset_job_def()
    instance.create_run_for_job(
        job, status=dg.DagsterRunStatus.NOT_STARTED, asset_selection=frozenset([asset_key(AAPL_1H)])
    )
    assert find_active_runs(instance).find(AAPL_1H)
    with time_machine.travel(datetime.now(UTC) + timedelta(hours=1), tick=False):
        assert not find_active_runs(instance).find(AAPL_1H)


# ---------------------------------------------------------------------------------------------------- Dagster's side


def evaluate(settings: Settings, universe: list[Series], instance: dg.DagsterInstance, now: datetime) -> object:
    sensor = make_tail_sensor(settings, universe, now=lambda: now)
    repository = build_defs(settings, universe).get_repository_def()
    return sensor.evaluate_tick(dg.build_sensor_context(instance=instance, repository_def=repository))


def test_the_sensors_are_part_of_the_definitions_and_run_by_default(offline: Settings) -> None:
    """Users do not have to switch them on; the tail sensor ticks every five minutes."""
    repository = build_defs(offline, [AAPL_1H, AAPL_1D]).get_repository_def()
    sensors = {s.name: s for s in repository.sensor_defs}
    assert set(sensors) == {"tail_fill", "gap_fill", "reconcile"}
    assert {s.default_status for s in sensors.values()} == {dg.DefaultSensorStatus.RUNNING}
    assert sensors["tail_fill"].minimum_interval_seconds == 300
    assert [s.name for s in repository.schedule_defs] == ["retention"]


def test_the_sensor_hands_over_requests_reasons_and_cursor(offline: Settings, instance: dg.DagsterInstance) -> None:
    """What a tick decides reaches Dagster: first a request and its attempt, then the reason to skip."""
    hold(offline.data_dir, AAPL_1H, MARCH, TUESDAY)
    data = evaluate(offline, [AAPL_1H], instance, TUESDAY + timedelta(hours=2))
    assert len(data.run_requests) == 1  # type: ignore[attr-defined]
    assert read_cursor(data.cursor).attempts["AAPL_1h"].tries == 1  # type: ignore[attr-defined]
    data = evaluate(offline, [AAPL_1H], instance, TUESDAY + timedelta(minutes=1))
    assert not data.run_requests  # type: ignore[attr-defined]
    assert "tail complete until" in data.skip_message  # type: ignore[attr-defined]


def test_an_empty_universe_is_a_reason_too(offline: Settings, instance: dg.DagsterInstance) -> None:
    """Nothing to do is said, not left open."""
    assert evaluate(offline, [], instance, TUESDAY).skip_message == "the universe is empty"  # type: ignore[attr-defined]


def test_a_timeframe_with_a_schedule_is_the_schedules_alone(
    make_settings: MakeSettings, instance: dg.DagsterInstance
) -> None:
    """The sensor names the schedule and leaves the series alone; the schedule asks for them in one run."""
    settings = make_settings(4001, tail_schedules={"1d": "30 22 * * 1-5"})
    hold(settings.data_dir, AAPL_1D, utc("2024-01-02"), utc("2024-03-04T12:00:00"))
    data = evaluate(settings, [AAPL_1D], instance, TUESDAY)
    assert not data.run_requests  # type: ignore[attr-defined]
    assert data.skip_message == "1d: on a schedule (30 22 * * 1-5)"  # type: ignore[attr-defined]
    repository = build_defs(settings, [AAPL_1D, AAPL_1H]).get_repository_def()
    listed = repository.get_schedule_def("tail_1d")
    assert len(repository.schedule_defs) == 2
    assert (listed.name, listed.cron_schedule, listed.execution_timezone) == ("tail_1d", "30 22 * * 1-5", "UTC")
    assert listed.default_status is dg.DefaultScheduleStatus.RUNNING

    def evaluate_schedule(now: datetime) -> object:
        (schedule,) = make_tail_schedules(settings, [AAPL_1D], now=lambda: now)
        context = dg.build_schedule_context(instance=instance, repository_def=repository, scheduled_execution_time=now)
        return schedule.evaluate_tick(context)

    ticked = evaluate_schedule(utc("2024-03-05T22:30:00"))
    (request,) = ticked.run_requests  # type: ignore[attr-defined]
    assert request.partition_key == "2024"
    assert request.tags["ktrdr/origin"] == "schedule"
    quiet = evaluate_schedule(utc("2024-03-04T13:00:00"))
    assert "tail complete until" in quiet.skip_message  # type: ignore[attr-defined]


@pytest.mark.parametrize("cron", ["30 22 * * 1-5", "0 9-17/2 * jan-mar mon-fri", "0  0 * * sun"])
def test_cron_expressions_are_what_dagster_takes(cron: str, make_settings: MakeSettings) -> None:
    """The schedule has it unchanged."""
    (schedule,) = make_tail_schedules(make_settings(4001, tail_schedules={"1d": cron}), [AAPL_1D])
    assert schedule.cron_schedule == cron


@pytest.mark.parametrize("cron", ["", "x", "30 22 * *", "60 0 * * *", "0 0 * * 8", "0 0 30 2 *", "0 0 * * * *"])
def test_a_mistyped_cron_expression_is_one_clear_error(cron: str, make_settings: MakeSettings) -> None:
    """It names the setting, the timeframe and the value, even for a timeframe that the universe has no series of."""
    with pytest.raises(InputError) as caught:
        make_tail_schedules(make_settings(4001, tail_schedules={"1d": cron}), [AAPL_1H])
    assert all(word in caught.value.observed for word in ("KTRDR_TAIL_SCHEDULES", repr(cron), "1d"))
    assert "\n" not in str(caught.value)


def test_an_unknown_timeframe_in_the_schedules_is_refused(make_settings: MakeSettings) -> None:
    """And 1M is read as 1mo."""
    with pytest.raises(InputError, match="unknown timeframe '9d'"):
        make_settings(4001, KTRDR_TAIL_SCHEDULES={"9d": "0 0 * * *"})
    assert make_settings(4001, tail_schedules={"1M": "0 0 1 * *"}).tail_schedules == {"1mo": "0 0 1 * *"}


# ---------------------------------------------------------------------------------------------------- executed


@pytest.mark.slow
def test_switched_off_for_a_week_is_one_run_and_one_request_a_series(
    start_gateway: StartGateway, make_settings: MakeSettings, instance: dg.DagsterInstance
) -> None:
    """Two hourly series that stopped a week ago: the tick asks for one run, which ends with complete files, materialized
    partitions and two requests; the tick after it has nothing to ask."""
    gateway = start_gateway()
    settings = make_settings(gateway.port)
    universe = [AAPL_1H, EURO_1H]
    now = datetime.now(UTC).replace(microsecond=0)
    for series in universe:
        hold(settings.data_dir, series, now - timedelta(days=45), now - timedelta(days=7))
    (request,) = tick(settings, universe, now).requests
    result = execute(settings, universe, instance, request)
    assert result.success
    assert len(gateway.requests) == 2
    for series in universe:
        expected = expected_bars(series, Window(now - timedelta(days=45), now), complete_at_s=int(now.timestamp()))
        assert set(expected.opens.tolist()) <= set(Store(settings.data_dir).held_opens(series).tolist())
        key = partition_at(series.timeframe, now).key
        assert partition_statuses(instance, series, settings, [key]) == {key: "MATERIALIZED"}
    assert tick(settings, universe, now).requests == []


@pytest.mark.slow
def test_a_run_that_finds_no_gateway_fails_and_is_asked_for_again_later(
    make_settings: MakeSettings, instance: dg.DagsterInstance, unused_port: int
) -> None:
    """The partition shows as failed, the file is as before, the next tick waits, a later one tries again."""
    settings = make_settings(unused_port)
    now = datetime.now(UTC).replace(microsecond=0)
    hold(settings.data_dir, AAPL_1H, now - timedelta(days=20), now - timedelta(days=7))
    first = tick(settings, [AAPL_1H], now)
    result = execute(settings, [AAPL_1H], instance, first.requests[0])
    assert not result.success
    _, last = partition_range(first.requests[0])
    assert partition_statuses(instance, AAPL_1H, settings, [last]) == {last: "FAILED"}
    soon = tick(settings, [AAPL_1H], now + timedelta(minutes=2), tried=Tried(first.attempts))
    assert soon.requests == []
    again = tick(settings, [AAPL_1H], now + timedelta(minutes=5), tried=Tried(first.attempts))
    assert again.requests[0].run_key != first.requests[0].run_key


def test_a_series_that_stands_still_is_asked_for_four_times_a_day() -> None:
    """Delisted or halted: every half hour at first, after five days and twenty empty tries every six hours, never for nothing
    every five minutes. A market that was only closed for a while is not meant."""
    last = int(utc("2024-06-03T20:00:00").timestamp())
    weeks_later, next_day = last + 15 * 86400, last + 86400
    assert Attempt(last, 21, weeks_later).next_at_s - weeks_later > 5.9 * 3600
    assert Attempt(last, 20, weeks_later).next_at_s - weeks_later <= 1800
    assert Attempt(last, 40, next_day).next_at_s - next_day <= 1800
