"""Promises of the gap sensor: inner gaps are loaded, the newest first, a few requests at a time, and not again and again.

Real Dagster instances and files; the clock is passed in. Runs that a tick asks for are really executed at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import chain, repeat

import dagster as dg
import numpy as np
import pytest

from ktrdr_pipelines.bars.schema import bars_from_columns
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.definitions import build_defs
from ktrdr_pipelines.domain.instruments import Instrument, Series, forex, stock
from ktrdr_pipelines.domain.partitions import partition_from_key, partitions_in
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.orchestration.assets import asset_key, op_name
from ktrdr_pipelines.orchestration.automation.cancelled import CancelledRanges
from ktrdr_pipelines.orchestration.automation.gap_fill import GapFiller, GapState, GapTick, write_cursor
from ktrdr_pipelines.orchestration.automation.run_requests import MAX_PARTITIONS
from ktrdr_pipelines.orchestration.automation.sensors import make_gap_sensor
from ktrdr_pipelines.orchestration.runs.queries import ActiveRuns
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.sidecar import ProvenEmpty
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.conftest import StartGateway
from ktrdr_pipelines_tests.fakes import utc
from ktrdr_pipelines_tests.holding import execute, hold, partition_range, partition_statuses

MakeSettings = Callable[..., Settings]

AAPL_1H, MSFT_1H = (Series(stock(symbol), TIMEFRAMES["1h"]) for symbol in ("AAPL", "MSFT"))
AAPL_1M = Series(stock("AAPL"), TIMEFRAMES["1m"])
NOW = utc("2024-06-14T23:00:00")
NO_RUNS = ActiveRuns({})
THREE_GAPS = [*range(20, 30), *range(300, 310), *range(700, 710)]
"""Of a year of hourly bars from June 2023 on: in June, in August, in October."""


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    """No gateway."""
    return make_settings(4001)


def tick(
    settings: Settings,
    instance: dg.DagsterInstance,
    universe: Sequence[Series] = (AAPL_1H,),
    now: datetime = NOW,
    *,
    state: GapState | None = None,
    active: ActiveRuns = NO_RUNS,
) -> GapTick:
    filler = GapFiller(settings, universe)
    return filler.run_tick(instance, active, CancelledRanges(), state or GapState(), now)


def after(found: GapTick) -> GapState:
    """What the next tick reads from the cursor."""
    return GapState.from_cursor(write_cursor(found))


def ranges_of(found: GapTick) -> list[tuple[str, str]]:
    return [partition_range(request) for request in found.requests]


def record(instance: dg.DagsterInstance, keys: Sequence[str], series: Series = AAPL_1H) -> None:
    """Dagster's record says that ``keys`` are materialized."""
    for key in keys:
        instance.report_runless_asset_event(dg.AssetMaterialization(asset_key(series), partition=key))


# ---------------------------------------------------------------------------------------------------- what is a gap


def test_three_gaps_of_an_adopted_file_are_requested_newest_first(
    make_settings: MakeSettings, instance: dg.DagsterInstance
) -> None:
    """One request a tick here: October, August, June; each run is limited to its gap."""
    settings = make_settings(4001, auto_requests=1)
    hold(settings.data_dir, AAPL_1H, utc("2023-06-01"), NOW, without=THREE_GAPS)
    path = settings.data_dir / "AAPL_1h.csv"
    (settings.data_dir / "AAPL_1h.meta.json").unlink()
    path.write_text(path.read_text().replace("timestamp,", "date,"))
    os.utime(path, (NOW.timestamp() - 3600,) * 2)
    first = tick(settings, instance)
    assert ranges_of(first) == [("2023-10-01", "2023-10-01")]
    assert "adopted" in first.notices[0]
    (request,) = first.requests
    config = request.run_config["ops"][op_name(AAPL_1H)]["config"]
    opens = expected_bars(AAPL_1H, Window(utc("2023-06-01"), NOW)).opens[700:710]
    assert config["mode"] == "full"
    assert config["start"] == datetime.fromtimestamp(int(opens[0]), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert opens[-1] < datetime.fromisoformat(config["end"]).timestamp() <= opens[-1] + 3600
    assert request.tags["ktrdr/origin"] == "gap_fill"
    assert request.tags["ktrdr/work"] == "backfill"
    assert int(request.tags["dagster/priority"]) < 0
    # The runs bring the bars.
    hold(settings.data_dir, AAPL_1H, utc("2023-06-01"), NOW, without=THREE_GAPS[:20])
    second = tick(settings, instance, state=after(first), now=NOW + timedelta(minutes=10))
    assert ranges_of(second) == [("2023-08-01", "2023-08-01")]
    hold(settings.data_dir, AAPL_1H, utc("2023-06-01"), NOW, without=THREE_GAPS[:10])
    third = tick(settings, instance, state=after(second), now=NOW + timedelta(minutes=20))
    assert ranges_of(third) == [("2023-06-01", "2023-06-01")]
    hold(settings.data_dir, AAPL_1H, utc("2023-06-01"), NOW)
    done = tick(settings, instance, state=after(third), now=NOW + timedelta(minutes=30))
    assert (done.requests, done.reasons, done.sweeps) == ([], ["no gaps in what is held"], {})


def test_what_a_tick_starts_is_bounded(make_settings: MakeSettings, instance: dg.DagsterInstance) -> None:
    """Forty gaps of one series, of which 15 requests are allowed: the newest, and the next tick goes on below them."""
    settings = make_settings(4001, auto_requests=15)
    gaps = range(10, 4010, 100)
    hold(settings.data_dir, AAPL_1H, utc("2020-01-02"), NOW, without=gaps)
    first = tick(settings, instance)
    opens = expected_bars(AAPL_1H, Window(utc("2020-01-02"), NOW)).opens[list(gaps)]
    starts = [step["config"]["start"] for request in first.requests for step in request.run_config["ops"].values()]
    oldest = min(datetime.fromisoformat(start).timestamp() for start in starts)
    newest_ones = [open_s for open_s in opens if open_s >= oldest]
    # Hourly gaps fourteen sessions apart: a month has one or two of them, and one request.
    assert 15 <= len(newest_ones) <= 30
    second = tick(settings, instance, state=replace(after(first), sweeps=_progressed(first)), now=NOW)
    ends = [step["config"]["end"] for request in second.requests for step in request.run_config["ops"].values()]
    assert max(datetime.fromisoformat(end).timestamp() for end in ends) <= oldest


def _progressed(found: GapTick) -> dict[str, object]:
    """As if the run had brought one bar, so that the sweep goes on without a pause."""
    return {name: replace(sweep, missing=sweep.missing + 1) for name, sweep in found.sweeps.items()}


def test_a_gap_that_costs_too_much_is_left_to_the_user(settings: Settings, instance: dg.DagsterInstance) -> None:
    """Between two islands that a user loaded lie eleven years: they are shown with the command, and nothing is started."""
    opens = expected_bars(AAPL_1H, Window(utc("2012-01-03"), utc("2024-06-01"))).opens
    kept = opens[(opens < utc("2012-02-01").timestamp()) | (opens >= utc("2024-05-01").timestamp())]
    price = np.full(len(kept), 100.0)
    bars = bars_from_columns(kept, price, price, price, price, price)
    Store(settings.data_dir).write(AAPL_1H, bars, answered=None, source="simulator", now=utc("2024-06-01"))
    found = tick(settings, instance)
    assert found.requests == []
    (reason,) = found.reasons
    assert "`ktrdr ib-load AAPL 1h --mode full --start 2012-02-01T14:00:00Z --end 2024-04-30T20:00:00Z`" in reason


def test_neither_the_tail_nor_what_is_older_is_a_gap(settings: Settings, instance: dg.DagsterInstance) -> None:
    """Nothing that was never loaded is requested; nor is a series without a file."""
    hold(settings.data_dir, AAPL_1H, utc("2024-01-01"), NOW - timedelta(days=21))
    assert tick(settings, instance, (AAPL_1H, MSFT_1H)).requests == []


def test_bars_that_are_absent_at_ib_are_no_gap(settings: Settings, instance: dg.DagsterInstance) -> None:
    """Confirmed absent is settled."""
    hold(settings.data_dir, AAPL_1H, utc("2023-06-01"), NOW, without=range(20, 23))
    opens = expected_bars(AAPL_1H, Window(utc("2023-06-01"), NOW))
    store = Store(settings.data_dir)
    gap = Window.from_epoch(int(opens.opens[20]), int(opens.closes[22]))
    assert len(tick(settings, instance).requests) == 1
    none = store.read_bars(AAPL_1H, Window(NOW, NOW))
    absent = ProvenEmpty(start=gap.start, end=gap.end, opens=3)
    store.write(AAPL_1H, none, answered=None, source="simulator", now=NOW, proven_empty=[absent])
    assert tick(settings, instance).reasons == ["no gaps in what is held"]


def test_what_an_earlier_load_could_not_finish_is_a_gap(settings: Settings, instance: dg.DagsterInstance) -> None:
    """A window in February failed, newer bars arrived. The tail continues after them, so the gap sensor has it."""
    hold(settings.data_dir, AAPL_1H, utc("2024-01-02"), NOW, without=range(160, 200))
    Store(settings.data_dir).note_unfinished(AAPL_1H, utc("2024-02-05T14:30:00"), None, now=NOW)
    assert ranges_of(tick(settings, instance)) == [("2024-02-01", "2024-02-01")]


def test_recorded_partitions_of_a_deleted_file_are_requested(settings: Settings, instance: dg.DagsterInstance) -> None:
    """Everything that was recorded, the unfinished month included, and nothing else."""
    record(instance, ["2024-01-01", "2024-02-01", "2024-06-01"])
    found = tick(settings, instance)
    keys = {key for request in found.requests for key in partition_range(request)}
    assert keys == {"2024-01-01", "2024-06-01"}
    starts = [step["config"]["start"] for request in found.requests for step in request.run_config["ops"].values()]
    assert min(starts) == "2024-01-02T14:00:00Z"


def test_a_recorded_partition_at_the_begin_that_lost_its_bars_is_requested(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    """It was loaded once, although nothing before it is held."""
    hold(settings.data_dir, AAPL_1H, utc("2024-03-11"), NOW)
    record(instance, ["2024-03-01", "2024-04-01"])
    assert ranges_of(tick(settings, instance)) == [("2024-03-01", "2024-03-01")]


def test_two_series_that_miss_the_same_are_one_run(settings: Settings, instance: dg.DagsterInstance) -> None:
    """An outage hit both."""
    for series in (AAPL_1H, MSFT_1H):
        hold(settings.data_dir, series, utc("2024-01-02"), NOW, without=range(160, 200))
    (request,) = tick(settings, instance, (AAPL_1H, MSFT_1H)).requests
    assert set(request.asset_selection or ()) == {asset_key(AAPL_1H), asset_key(MSFT_1H)}


def test_gaps_that_are_years_apart_are_runs_of_their_own(settings: Settings, instance: dg.DagsterInstance) -> None:
    """Dagster would plan every day between them. No run has more than 2,000 partitions."""
    hold(settings.data_dir, AAPL_1M, utc("2022-01-03"), utc("2024-06-01"), without=[5, 390 * 10 + 5, 390 * 500 + 5])
    found = tick(settings, instance, (AAPL_1M,))
    assert len(found.requests) == 2
    for request in found.requests:
        first, last = (partition_from_key(AAPL_1M.timeframe, key).window for key in partition_range(request))
        assert len(list(partitions_in(AAPL_1M.timeframe, Window(first.start, last.end)))) <= min(20, MAX_PARTITIONS)


def test_a_continuous_future_is_one_request_if_it_reaches_the_gap(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    """IB serves it up to now; a gap that no request reaches is not requested for nothing."""
    series = Series(Instrument("ES", "CONTFUT", "CME", "USD"), TIMEFRAMES["1h"])
    hold(settings.data_dir, series, NOW - timedelta(days=500), NOW, without=[5, -100])
    (request,) = tick(settings, instance, (series,)).requests
    assert partition_range(request) == ("2024-06-01", "2024-06-01")
    hold(settings.data_dir, series, NOW - timedelta(days=300), NOW)
    assert tick(settings, instance, (series,)).requests == []


# ---------------------------------------------------------------------------------------------------- again, and when


def test_what_brings_nothing_is_requested_again_after_growing_pauses(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    """Ticks every ten minutes for ten days while nothing arrives: at once, after an hour, four, sixteen, sixty-four."""
    hold(settings.data_dir, AAPL_1H, utc("2023-06-01"), NOW, without=THREE_GAPS)
    filler, state, asked = GapFiller(settings, [AAPL_1H]), GapState(), []
    for step in range(6 * 24 * 10):
        now = NOW + timedelta(minutes=10 * step)
        found = filler.run_tick(instance, NO_RUNS, CancelledRanges(), state, now)
        state = after(found)
        if found.requests:
            asked.append(step / 6)
        else:
            assert "brought nothing" in found.reasons[0]
    assert asked == [0, 1, 5, 21, 85]


def test_a_new_gap_does_not_start_the_old_ones_again(settings: Settings, instance: dg.DagsterInstance) -> None:
    """The newest bars of a rarely traded stock are missing again and again: each is requested once at once, the old ones wait."""
    begin = utc("2024-01-02")
    hold(settings.data_dir, AAPL_1H, begin, NOW, without=[20, 21])
    state = after(tick(settings, instance))
    count = len(expected_bars(AAPL_1H, Window(begin, NOW), complete_at_s=int(NOW.timestamp())).opens)
    asked = []
    for number, day in enumerate(
        (3, 4, 6), 1
    ):  # Monday, Tuesday and Thursday; the second bar of each day does not come
        at = NOW + timedelta(days=day)
        missing = [count + 7 * n + 1 for n in range(number)]
        hold(settings.data_dir, AAPL_1H, begin, at, without=[20, 21, *missing])
        found = tick(settings, instance, now=at, state=state)
        state = after(found)
        asked.append([step["config"]["start"] for r in found.requests for step in r.run_config["ops"].values()])
    assert [max(starts)[:10] for starts in asked] == ["2024-06-17", "2024-06-18", "2024-06-20"]
    assert sum(len(starts) for starts in asked) == 3


def test_nothing_is_started_while_the_last_gaps_are_being_loaded(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    """Runs do not pile up when others use the budget; a series in any run is left to it."""
    hold(settings.data_dir, AAPL_1H, utc("2023-06-01"), NOW, without=THREE_GAPS)
    found = tick(settings, instance, active=ActiveRuns({}, by_origin={"gap_fill": "run-1"}))
    assert (found.requests, found.reasons) == ([], ["the last gaps are still being loaded (run-1)"])
    assert tick(settings, instance, active=ActiveRuns({asset_key(AAPL_1H): "run-2"})).requests == []


def test_a_file_that_is_being_written_is_left_alone(settings: Settings, instance: dg.DagsterInstance) -> None:
    """Half a minute after its last change it is looked at."""
    hold(settings.data_dir, AAPL_1H, utc("2023-06-01"), NOW, without=THREE_GAPS)
    os.utime(settings.data_dir / "AAPL_1h.csv", (NOW.timestamp() - 5,) * 2)
    assert tick(settings, instance).requests == []
    assert len(tick(settings, instance, now=NOW + timedelta(seconds=30)).requests) > 0


def test_a_tick_that_takes_too_long_is_continued_by_the_next(settings: Settings, instance: dg.DagsterInstance) -> None:
    """What it found is requested, the cursor names where to go on."""
    for series in (AAPL_1H, MSFT_1H):
        hold(settings.data_dir, series, utc("2024-01-02"), NOW, without=range(160, 200))
    filler = GapFiller(settings, [MSFT_1H, AAPL_1H])
    times = chain([0.0, 1000.0], repeat(1000.0))
    first = filler.run_tick(instance, NO_RUNS, CancelledRanges(), GapState(), NOW, clock=lambda: next(times))
    assert [r.asset_selection for r in first.requests] == [[asset_key(AAPL_1H)]]
    assert first.continue_at == "MSFT_1h"
    second = filler.run_tick(instance, NO_RUNS, CancelledRanges(), after(first), NOW)
    assert [r.asset_selection for r in second.requests] == [[asset_key(MSFT_1H)]]


def test_what_cannot_be_read_does_not_stop_the_others(settings: Settings, instance: dg.DagsterInstance) -> None:
    """It is listed with its reason."""
    odd = Series(forex("EURUSD"), TIMEFRAMES["1h"])
    for series in (AAPL_1H, odd):
        hold(settings.data_dir, series, utc("2024-01-02"), NOW, without=range(160, 200))
    (settings.data_dir / "EURUSD_1h.meta.json").write_text('{"version": 99}')
    found = tick(settings, instance, (odd, AAPL_1H))
    assert [r.asset_selection for r in found.requests] == [[asset_key(AAPL_1H)]]
    assert any("newer version" in problem for problem in found.problems)


@pytest.mark.parametrize("cursor", [None, "", "garbage", "[1]", '{"sweeps": {"AAPL_1h": 3}}', "null"])
def test_a_cursor_that_is_not_ours_is_no_obstacle(cursor: str | None) -> None:
    """It means that nothing was requested."""
    assert GapState.from_cursor(cursor) == GapState()


# ---------------------------------------------------------------------------------------------------- executed


def test_the_sensor_is_a_setting(make_settings: MakeSettings) -> None:
    """On by default."""
    statuses = [make_gap_sensor(make_settings(4001, gap_sensor=on), [AAPL_1H]).default_status for on in (True, False)]
    assert statuses == [dg.DefaultSensorStatus.RUNNING, dg.DefaultSensorStatus.STOPPED]


@pytest.mark.slow
def test_deleted_lines_come_back(
    start_gateway: StartGateway, make_settings: MakeSettings, instance: dg.DagsterInstance
) -> None:
    """Forty lines of a loaded file are gone: one run with one request brings the same bars back; then nothing is left to do."""
    gateway = start_gateway()
    settings = make_settings(gateway.port, partition_starts={"1h": "2024-01-01"})
    now = datetime.now(UTC)
    job = build_defs(settings, [AAPL_1H]).resolve_implicit_global_asset_job_def()
    tags = {"dagster/asset_partition_range_start": "2024-01-01", "dagster/asset_partition_range_end": "2024-06-01"}
    assert job.execute_in_process(instance=instance, tags=tags, asset_selection=[asset_key(AAPL_1H)]).success
    path = settings.data_dir / "AAPL_1h.csv"
    before = path.read_text()
    lines = before.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if line.startswith("2024-03-27"))
    path.write_text("".join(lines[:first] + lines[first + 40 :]))
    os.utime(path, (now.timestamp() - 3600,) * 2)
    requests = len(gateway.requests)
    sensor = make_gap_sensor(settings, [AAPL_1H], now=lambda: now)
    repository = build_defs(settings, [AAPL_1H]).get_repository_def()
    data = sensor.evaluate_tick(dg.build_sensor_context(instance=instance, repository_def=repository))
    (request,) = data.run_requests or []
    assert partition_range(request) == ("2024-03-01", "2024-04-01")
    assert execute(settings, [AAPL_1H], instance, request).success
    assert path.read_text() == before
    assert len(gateway.requests) == requests + 1
    keys = ["2024-03-01", "2024-04-01"]
    assert partition_statuses(instance, AAPL_1H, settings, keys) == dict.fromkeys(keys, "MATERIALIZED")
    os.utime(path, (now.timestamp() - 3600,) * 2)
    assert tick(settings, instance, now=now, state=GapState.from_cursor(data.cursor)).requests == []


@pytest.mark.slow
def test_a_file_that_is_none_any_more_makes_its_partitions_fail(
    make_settings: MakeSettings, instance: dg.DagsterInstance, unused_port: int
) -> None:
    """Overwritten with something else: listed, requested, and failed with the reason; the file is left alone."""
    settings = make_settings(unused_port, partition_starts={"1h": "2023-06-01"})
    record(instance, ["2024-03-01", "2024-04-01"])
    settings.data_dir.mkdir()
    path = settings.data_dir / "AAPL_1h.csv"
    path.write_text("shopping list\nmilk\n")
    found = tick(settings, instance)
    assert found.problems[0].startswith("AAPL 1h: ")
    (request,) = found.requests
    assert not execute(settings, [AAPL_1H], instance, request).success
    keys = ["2024-03-01", "2024-04-01"]
    assert partition_statuses(instance, AAPL_1H, settings, keys) == dict.fromkeys(keys, "FAILED")
    assert path.read_text() == "shopping list\nmilk\n"
    assert tick(settings, instance, state=after(found)).requests == []
