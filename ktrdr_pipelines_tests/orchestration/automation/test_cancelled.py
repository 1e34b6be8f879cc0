"""Promises about cancelled loads: no sensor starts a cancelled range again, until a user does.

Real Dagster instances and runs; the clock is passed in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

import dagster as dg
import numpy as np
import pytest
import time_machine

from ktrdr_pipelines.definitions import build_defs
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.automation.cancelled import (
    Cancelled,
    CancelledRanges,
    is_by_user,
    read_cancelled,
)
from ktrdr_pipelines.orchestration.automation.due import HeldEnds
from ktrdr_pipelines.orchestration.automation.sensors import make_gap_sensor, make_tail_sensor
from ktrdr_pipelines.orchestration.automation.tail import TailTick, decide_tail
from ktrdr_pipelines.orchestration.runs.queries import ActiveRuns
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import utc
from ktrdr_pipelines_tests.holding import hold, partition_range

MakeSettings = Callable[..., Settings]

AAPL_1H, MSFT_1H = (Series(stock(symbol), TIMEFRAMES["1h"]) for symbol in ("AAPL", "MSFT"))
NOW = utc("2024-03-05T16:00:00")  # a Tuesday, 11:00 in New York
_Status = dg.DagsterRunStatus


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    """No gateway; the whole history would be few enough requests for a sensor."""
    return make_settings(4001, auto_requests=500)


@pytest.fixture
def clock() -> Iterator[time_machine.Coordinates]:
    """Dagster stamps runs with this time."""
    with time_machine.travel(NOW, tick=False) as traveller:
        yield traveller


def start_run(
    instance: dg.DagsterInstance,
    settings: Settings,
    first: str,
    last: str,
    *,
    series: Sequence[Series] = (AAPL_1H,),
    **tags: str,
) -> dg.DagsterRun:
    """A run of a backfill that a user started in the UI, unless ``tags`` say otherwise."""
    where = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
    where = {"dagster/partition": first} if first == last else where
    more = {name.replace("__", "/"): value for name, value in tags.items()} or {"dagster/backfill": "abcdefgh"}
    job = build_defs(settings, series).resolve_implicit_global_asset_job_def()
    keys = frozenset(asset_key(each) for each in series)
    return instance.create_run_for_job(job, status=_Status.STARTED, asset_selection=keys, tags={**where, **more})


def tick(settings: Settings, instance: dg.DagsterInstance, now: datetime) -> TailTick:
    held = HeldEnds(settings.data_dir)
    return decide_tail(settings, [AAPL_1H], held, ActiveRuns({}), now, cancelled=read_cancelled(instance, now))


def evaluate(sensor: dg.SensorDefinition, settings: Settings, instance: dg.DagsterInstance) -> object:
    repository = build_defs(settings, [AAPL_1H]).get_repository_def()
    return sensor.evaluate_tick(dg.build_sensor_context(instance=instance, repository_def=repository))


# ---------------------------------------------------------------------------------------------------- acceptance


def test_a_cancelled_backfill_of_sixty_months_is_not_started_again(
    settings: Settings, instance: dg.DagsterInstance, clock: time_machine.Coordinates
) -> None:
    """A year of it is in the file. No tick goes on with the rest, the reason names the command; bars that close later are loaded
    as usual, from the first of them on."""
    run = start_run(instance, settings, "2019-04-01", "2024-03-01")
    hold(settings.data_dir, AAPL_1H, utc("2019-04-01"), utc("2020-03-01"))
    assert len(tick(settings, instance, NOW).requests) == 1
    clock.move_to(NOW + timedelta(minutes=2))
    instance.report_run_canceled(run)
    for later in (timedelta(minutes=4), timedelta(minutes=50)):
        found = tick(settings, instance, NOW + later)
        assert found.requests == []
        assert found.attempts == {}
        assert "`ktrdr ib-load AAPL 1h --mode tail`" in found.reasons[0]
        assert "cancelled" in found.reasons[0]
    (request,) = tick(settings, instance, utc("2024-03-06T18:00:00")).requests
    assert partition_range(request) == ("2024-03-01", "2024-03-01")
    (step,) = request.run_config["ops"].values()
    assert step["config"]["start"] == "2024-03-05T16:00:00Z"  # the hour that had begun when the backfill was cancelled


def test_asked_for_again_by_a_user_the_sensors_go_on(
    settings: Settings, instance: dg.DagsterInstance, clock: time_machine.Coordinates
) -> None:
    """The later run of a user over the range ends the cancellation, also when it fails; that of a sensor does not."""
    hold(settings.data_dir, AAPL_1H, utc("2019-04-01"), utc("2020-03-01"))
    instance.report_run_canceled(start_run(instance, settings, "2019-04-01", "2024-03-01"))
    for minute, origin in enumerate(("sensor", "schedule", "reconcile", "gap_fill"), 1):
        clock.move_to(NOW + timedelta(minutes=minute))
        instance.report_run_failed(start_run(instance, settings, "2019-04-01", "2024-03-01", ktrdr__origin=origin))
        assert tick(settings, instance, NOW + timedelta(minutes=minute)).requests == []
    clock.move_to(NOW + timedelta(minutes=10))
    instance.report_run_failed(start_run(instance, settings, "2019-04-01", "2024-03-01", ktrdr__origin="cli"))
    (request,) = tick(settings, instance, NOW + timedelta(minutes=15)).requests
    assert partition_range(request) == ("2020-02-01", "2024-03-01")


def test_a_tail_does_not_go_back_to_bars_that_were_cancelled(
    settings: Settings, instance: dg.DagsterInstance, clock: time_machine.Coordinates
) -> None:
    """A load of this month was broken off in its middle and newer bars are held: the tail begins with the last of them, not where
    the load stopped."""
    hold(settings.data_dir, AAPL_1H, utc("2024-02-01"), NOW, without=[*range(152, 154)])
    Store(settings.data_dir).note_unfinished(AAPL_1H, utc("2024-03-04T15:00:00"), None, now=NOW)
    instance.report_run_canceled(start_run(instance, settings, "2024-03-01", "2024-03-01"))
    (request,) = tick(settings, instance, NOW + timedelta(hours=2)).requests
    (step,) = request.run_config["ops"].values()
    assert step["config"]["start"] == "2024-03-05T15:00:00Z"


def test_a_cancelled_gap_is_not_filled(
    settings: Settings, instance: dg.DagsterInstance, clock: time_machine.Coordinates
) -> None:
    """The gap sensor requests the gaps around it, in runs that do not cover it."""
    hold(
        settings.data_dir, AAPL_1H, utc("2023-06-01"), NOW, without=[*range(20, 30), *range(170, 180), *range(450, 460)]
    )
    instance.report_run_canceled(start_run(instance, settings, "2023-07-01", "2023-07-01"))
    sensor = make_gap_sensor(settings, [AAPL_1H], now=lambda: NOW + timedelta(minutes=5))
    data = evaluate(sensor, settings, instance)
    ranges = [partition_range(request) for request in data.run_requests]  # type: ignore[attr-defined]
    assert ranges == [("2023-09-01", "2023-09-01"), ("2023-06-01", "2023-06-01")]


def test_the_sensors_know_of_a_cancellation_when_its_run_has_been_deleted(
    settings: Settings, instance: dg.DagsterInstance, clock: time_machine.Coordinates
) -> None:
    """Runs are pruned; the ranges are kept beside them. A tick of the tail sensor has read it before."""
    hold(settings.data_dir, AAPL_1H, utc("2019-04-01"), utc("2020-03-01"))
    run = start_run(instance, settings, "2019-04-01", "2024-03-01")
    instance.report_run_canceled(run)
    sensor = make_tail_sensor(settings, [AAPL_1H], now=lambda: NOW + timedelta(minutes=5))
    assert "cancelled" in str(evaluate(sensor, settings, instance).skip_message)  # type: ignore[attr-defined]
    instance.delete_run(run.run_id)
    year_later = read_cancelled(instance, NOW + timedelta(days=365))
    assert year_later.find("AAPL_1h")[0].start_s == utc("2019-04-01").timestamp()


# ---------------------------------------------------------------------------------------------------- which runs


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, True),  # the UI
        ({"ktrdr/origin": "cli"}, True),
        ({"ktrdr/origin": "api"}, True),
        ({"ktrdr/origin": "sensor"}, False),
        ({"ktrdr/origin": "schedule"}, False),
        ({"ktrdr/origin": "gap_fill", "dagster/parent_run_id": "x"}, True),  # "Re-execute" in the UI
        ({"ktrdr/origin": "api", "dagster/parent_run_id": "x", "dagster/retry_number": "1"}, False),
    ],
)
def test_who_asked_for_a_run(tags: dict[str, str], expected: bool) -> None:
    """Users ask in the UI, by commands, by REST and by executing a run again; sensors, schedules and retries do not count."""
    assert is_by_user(tags) is expected


def test_a_run_cancelled_in_the_queue_counts(
    settings: Settings, instance: dg.DagsterInstance, clock: time_machine.Coordinates
) -> None:
    """It never began, so it has no end time."""
    run = start_run(instance, settings, "2024-01-01", "2024-01-01", series=(AAPL_1H, MSFT_1H))
    instance.report_run_canceled(run)
    found = read_cancelled(instance, NOW + timedelta(minutes=1))
    january = [Cancelled(int(utc("2024-01-01").timestamp()), int(utc("2024-02-01").timestamp()), int(NOW.timestamp()))]
    assert found.by_series == {"AAPL_1h": january, "MSFT_1h": january}


def test_ctrl_c_on_a_command_cancels(
    settings: Settings, instance: dg.DagsterInstance, clock: time_machine.Coordinates
) -> None:
    """Dagster records such a run as failed; a run that failed by itself is no cancellation."""
    instance.report_run_failed(start_run(instance, settings, "2024-01-01", "2024-01-01", ktrdr__origin="cli"))
    assert read_cancelled(instance, NOW + timedelta(minutes=1)).by_series == {}
    clock.move_to(NOW + timedelta(minutes=2))
    run = start_run(instance, settings, "2024-02-01", "2024-02-01", ktrdr__origin="cli")
    instance.report_run_failed(run)
    instance.add_run_tags(run.run_id, {"ktrdr/interrupted": "true"})
    (found,) = read_cancelled(instance, NOW + timedelta(minutes=3)).find("AAPL_1h")
    assert found.start_s == utc("2024-02-01").timestamp()


def test_partitions_of_another_grid_and_other_programs_are_left_out(
    settings: Settings, instance: dg.DagsterInstance, clock: time_machine.Coordinates
) -> None:
    """A home may have runs that this program does not understand."""
    instance.report_run_canceled(start_run(instance, settings, "2024-01-15", "2024-01-16"))

    @dg.asset
    def other() -> None: ...

    job = dg.Definitions([other]).resolve_implicit_global_asset_job_def()
    instance.report_run_canceled(instance.create_run_for_job(job, asset_selection=frozenset([other.key])))
    assert read_cancelled(instance, NOW).by_series == {}


# ---------------------------------------------------------------------------------------------------- ranges


@pytest.mark.parametrize("seed", range(20))
def test_ranges_are_what_a_line_of_marks_would_be(seed: int) -> None:
    """Any order of cancelling and requesting again leaves the points whose last event was a cancellation."""
    choose = random.Random(seed)
    line = np.zeros(50, np.int64)
    found = CancelledRanges()
    for at_s in range(100, 130):
        start, end = sorted(choose.sample(range(51), 2))
        if choose.random() < 0.5:
            found.cancel("X", start, end, at_s)
            line[start:end] = at_s
        else:
            found.request_again("X", start, end)
            line[start:end] = 0
    drawn = np.zeros(50, np.int64)
    for each in found.find("X"):
        assert not drawn[each.start_s : each.end_s].any()
        drawn[each.start_s : each.end_s] = each.at_s
    assert (drawn == line).all()
    assert CancelledRanges.from_json(found.to_json()) == found


def test_a_cancellation_is_not_about_the_future() -> None:
    """The unfinished partition is cancelled up to the moment of the cancellation."""
    found = CancelledRanges()
    found.cancel("X", 100, 200, 150.7)
    assert found.find("X") == [Cancelled(100, 150, 150)]
    found.cancel("Y", 160, 200, 150.7)
    assert found.find("Y") == ()


@pytest.mark.parametrize("text", [None, "", "garbage", "[]", '{"seen": 1}', '{"seen": 1, "series": {"X": [[1]]}}'])
def test_a_state_that_is_not_ours_is_no_obstacle(text: str | None) -> None:
    """It means that nothing was cancelled."""
    assert CancelledRanges.from_json(text) == CancelledRanges()


def test_reading_twice_changes_nothing(
    settings: Settings, instance: dg.DagsterInstance, clock: time_machine.Coordinates
) -> None:
    """Two sensors read at the same time, and the last hour is read again by each look."""
    instance.report_run_canceled(start_run(instance, settings, "2024-01-01", "2024-02-01"))
    clock.move_to(NOW + timedelta(minutes=1))
    instance.report_run_failed(start_run(instance, settings, "2024-02-01", "2024-02-01", ktrdr__origin="cli"))
    first = read_cancelled(instance, NOW + timedelta(minutes=2)).by_series
    assert read_cancelled(instance, NOW + timedelta(minutes=3)).by_series == first
    (left,) = first["AAPL_1h"]
    assert datetime.fromtimestamp(left.end_s, UTC) == utc("2024-02-01")
