"""Promises of reconciling: what files have is recorded, what a recorded partition lost is known, and a tick does little.

The comparison as a table; the tick on real instances and files; the repair of a cut file really executed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from itertools import chain, repeat
from pathlib import Path

import dagster as dg
import numpy as np
import pytest

from ktrdr_pipelines.bars.schema import empty_bars
from ktrdr_pipelines.definitions import build_defs
from ktrdr_pipelines.domain.instruments import Series, forex, stock
from ktrdr_pipelines.domain.load_request import Mode
from ktrdr_pipelines.domain.partitions import partition_from_key, partitions_in
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.automation.reconcile import Reconciler, ReconcileTick, compare, make_reconcile_sensor
from ktrdr_pipelines.orchestration.automation.run_requests import request_run
from ktrdr_pipelines.planning.coverage import PartitionState, judge_partitions
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.sidecar import HistoryStart, ProvenEmpty
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.conftest import StartGateway
from ktrdr_pipelines_tests.fakes import FakeHistory, run_load, utc, window
from ktrdr_pipelines_tests.holding import execute, hold, partition_statuses

MakeSettings = Callable[..., Settings]

AAPL_1H = Series(stock("AAPL"), TIMEFRAMES["1h"])
MSFT_1H = Series(stock("MSFT"), TIMEFRAMES["1h"])
NOW = utc("2024-06-14T23:00:00")
MONTHS = ["2024-01-01", "2024-02-01", "2024-03-01", "2024-04-01", "2024-05-01", "2024-06-01"]

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(make_settings: MakeSettings, unused_port: int) -> Settings:
    """Hourly partitions from 2023 on, and no gateway."""
    return make_settings(unused_port, partition_starts={"1h": "2023-06-01"})


def reconcile(settings: Settings, instance: dg.DagsterInstance, now: datetime = NOW, cursor: str = "") -> ReconcileTick:
    return Reconciler(settings, [AAPL_1H]).run_tick(instance, cursor, now)


def find_lost(settings: Settings, instance: dg.DagsterInstance, now: datetime = NOW) -> list[tuple[str, str]]:
    """First and last key of each block of recorded partitions that lost bars."""
    found, _ = Reconciler(settings, [AAPL_1H]).find_drift(
        AAPL_1H, Store(settings.data_dir), instance, now, ReconcileTick()
    )
    return [(block[0].key, block[-1].key) for block in found.lost]


def load_again(settings: Settings, instance: dg.DagsterInstance, first: str, last: str) -> bool:
    """Load partitions, as a sensor would. Returns whether that succeeded."""
    ends = [partition_from_key(AAPL_1H.timeframe, key) for key in (first, last)]
    request = request_run([AAPL_1H], ends[0], ends[1], Mode.FULL, origin="sensor", run_key="test")
    return execute(settings, [AAPL_1H], instance, request).success


def record(instance: dg.DagsterInstance, keys: list[str], series: Series = AAPL_1H) -> None:
    """Dagster's record says that ``keys`` are materialized."""
    for key in keys:
        instance.report_runless_asset_event(dg.AssetMaterialization(asset_key(series), partition=key))


# ---------------------------------------------------------------------------------------------------- the comparison

STATES = {
    # name: rows, missing, missing before the last held bar, is something known of it
    "full": (140, 0, 0, True),
    "empty": (0, 0, 0, True),
    "cut": (100, 40, 40, True),
    "tail": (100, 40, 0, True),
    "gone": (0, 140, 140, False),
    "unknown": (0, 0, 0, False),
}


@pytest.mark.parametrize(
    ("state", "status", "verdict"),
    [
        ("full", None, "report"), ("full", "MATERIALIZED", ""), ("full", "FAILED", "report"), ("full", "IN_PROGRESS", ""),
        ("empty", None, "report"), ("empty", "MATERIALIZED", ""), ("empty", "FAILED", "report"), ("empty", "IN_PROGRESS", ""),
        ("cut", None, ""), ("cut", "MATERIALIZED", "lost"), ("cut", "FAILED", ""), ("cut", "IN_PROGRESS", ""),
        ("tail", None, ""), ("tail", "MATERIALIZED", ""), ("tail", "FAILED", ""), ("tail", "IN_PROGRESS", ""),
        ("gone", None, ""), ("gone", "MATERIALIZED", "lost"), ("gone", "FAILED", ""), ("gone", "IN_PROGRESS", ""),
        ("unknown", None, ""), ("unknown", "MATERIALIZED", ""), ("unknown", "FAILED", ""), ("unknown", "IN_PROGRESS", ""),
    ],
)  # fmt: skip
def test_the_table_of_verdicts(state: str, status: str | None, verdict: str) -> None:
    """Every state of a partition in the files against every status in Dagster's record."""
    (partition,) = partitions_in(AAPL_1H.timeframe, window("2024-03-01", "2024-04-01"))
    rows, missing, inside, known = STATES[state]
    found = PartitionState(partition, rows, None, None, missing, inside, known)
    drift = compare([found], {partition.key: status} if status else {})
    assert [s.partition for s in drift.to_report] == ([partition] if verdict == "report" else [])
    assert list(drift.lost) == ([(partition,)] if verdict == "lost" else [])


def test_lost_partitions_are_gathered_in_blocks() -> None:
    """Blocks of neighbours, and no block longer than allowed."""
    partitions = list(partitions_in(AAPL_1H.timeframe, window("2023-01-01", "2024-01-01")))
    cut = {0, 1, 2, 5, 8, 9, 10, 11}
    states = [PartitionState(p, 0, None, None, int(i in cut), int(i in cut), True) for i, p in enumerate(partitions)]
    drift = compare(states, {p.key: "MATERIALIZED" for p in partitions}, max_block=3)
    blocks = [[partitions.index(p) for p in block] for block in drift.lost]
    assert blocks == [[0, 1, 2], [5], [8, 9, 10], [11]]


@pytest.mark.parametrize("cut", [[], [0], [20, 21, 300], list(range(100, 500)), [-1]])
def test_completeness_is_judged_as_the_load_judges_it(tmp_path: Path, cut: list[int]) -> None:
    """The partitions that a load reports as complete without asking are those judged complete here."""
    hold(tmp_path, AAPL_1H, utc("2024-01-01"), NOW, without=cut)
    store = Store(tmp_path)
    span = window("2024-01-01", "2024-07-01")
    history = FakeHistory.of(AAPL_1H, span)
    load = Load(
        AAPL_1H,
        span,
        store=store,
        history=lambda: history,  # type: ignore[arg-type, return-value]
        limits=HistoryLimits.CLASSIC,
        now=lambda: NOW,
    )
    events = run_load(load)
    next(events)
    partitions = list(partitions_in(AAPL_1H.timeframe, span))
    states = judge_partitions(
        AAPL_1H, partitions, store.held_opens(AAPL_1H), store.read_sidecar(AAPL_1H), grid_start=span.start, now=NOW
    )
    complete = {s.partition.key for s in states if s.is_complete}
    reported = set()
    for event in events:
        if history.requests or not hasattr(event, "partition"):
            break
        reported.add(event.partition.key)
    assert reported == complete
    assert sum(s.missing for s in states) == len(cut)


# ---------------------------------------------------------------------------------------------------- held, unrecorded


def test_what_was_loaded_outside_dagster_is_reported(settings: Settings, instance: dg.DagsterInstance) -> None:
    """Complete months become materialized with their rows; the month that begins in the middle stays missing."""
    hold(settings.data_dir, AAPL_1H, utc("2024-01-10"), NOW)
    tick = reconcile(settings, instance)
    assert (tick.reported, tick.lost) == (5, 0)
    found = partition_statuses(instance, AAPL_1H, settings, MONTHS)
    assert found == {"2024-01-01": None, **dict.fromkeys(MONTHS[1:], "MATERIALIZED")}
    event = instance.get_latest_materialization_event(asset_key(AAPL_1H))
    assert event is not None
    assert event.asset_materialization is not None
    metadata = event.asset_materialization.metadata
    assert metadata["reconciled"].value is True
    assert metadata["dagster/row_count"].value == 70  # ten sessions of seven bars by the evening of 14 June
    assert metadata["last_bar"].value == utc("2024-06-14T19:00:00").timestamp()


def test_a_foreign_file_is_adopted_and_reported(settings: Settings, instance: dg.DagsterInstance) -> None:
    """A CSV of another program becomes a normal file, its complete months materialized, the original kept."""
    hold(settings.data_dir, AAPL_1H, utc("2024-01-01"), NOW)
    ours = settings.data_dir / "AAPL_1h.csv"
    lines = ours.read_text().splitlines()
    foreign = [
        "date,open,high,low,close,volume",
        *(line.replace("T", " ").replace("Z", "+00:00") for line in lines[1:]),
    ]
    (settings.data_dir / "AAPL_1h.meta.json").unlink()
    ours.write_text("\n".join(foreign) + "\n")
    tick = reconcile(settings, instance)
    assert tick.reported == 6
    assert "adopted" in tick.notices[0]
    assert set(partition_statuses(instance, AAPL_1H, settings, MONTHS).values()) == {"MATERIALIZED"}
    assert ours.read_text().splitlines() == lines
    assert list(settings.data_dir.glob("AAPL_1h.csv.bak-*"))


def test_a_file_that_is_being_copied_is_left_alone(settings: Settings, instance: dg.DagsterInstance) -> None:
    """Half a minute after its last change it is looked at."""
    hold(settings.data_dir, AAPL_1H, utc("2024-01-01"), NOW)
    path = settings.data_dir / "AAPL_1h.csv"
    os.utime(path, (NOW.timestamp() - 5,) * 2)
    assert reconcile(settings, instance).looked_at == 0
    assert reconcile(settings, instance, NOW + timedelta(seconds=30)).reported == 6


def test_before_the_start_of_history_is_complete_with_no_bars(settings: Settings, instance: dg.DagsterInstance) -> None:
    """Once it is known where history starts, the older months are materialized with no rows; the first one too."""
    hold(settings.data_dir, AAPL_1H, utc("2024-01-10"), NOW)
    start = HistoryStart(open=utc("2024-01-10T14:30:00"), known_by="test")
    Store(settings.data_dir).write(
        AAPL_1H, empty_bars(), answered=None, source="simulator", now=NOW, history_start=start
    )
    tick = reconcile(settings, instance)
    keys = [p.key for p in partitions_in(AAPL_1H.timeframe, window("2023-06-01", "2024-06-15"))]
    assert tick.reported == len(keys) == 13
    assert set(partition_statuses(instance, AAPL_1H, settings, keys).values()) == {"MATERIALIZED"}


def test_a_month_proven_empty_is_reported_and_one_never_asked_is_not(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    """Knowing that there is nothing is not the same as knowing nothing."""
    hold(settings.data_dir, AAPL_1H, utc("2024-04-01"), NOW)
    store = Store(settings.data_dir)
    empty = ProvenEmpty(start=utc("2024-02-01"), end=utc("2024-03-01"), opens=140)
    none = store.read_bars(AAPL_1H, window("2024-01-01", "2024-01-01"))
    store.write(AAPL_1H, none, answered=None, source="simulator", now=NOW, proven_empty=[empty])
    reconcile(settings, instance)
    found = partition_statuses(instance, AAPL_1H, settings, MONTHS)
    assert found["2024-01-01"] is None
    assert found["2024-02-01"] == "MATERIALIZED"
    assert found["2024-03-01"] is None


def test_a_series_without_a_file_and_without_a_record_is_left_missing(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    """Never asked is missing, also in a month in which no bar is expected yet."""
    tick = reconcile(settings, instance, utc("2024-06-01T12:00:00"))
    assert (tick.reported, tick.lost) == (0, 0)
    assert instance.get_materialized_partitions(asset_key(AAPL_1H)) == set()


# ---------------------------------------------------------------------------------------------------- recorded, gone


def test_forty_deleted_lines_are_known_and_can_be_repaired(
    start_gateway: StartGateway, make_settings: MakeSettings, instance: dg.DagsterInstance
) -> None:
    """Exactly the months that lost lines are listed; a run brings the same bars back; then nothing is left to do."""
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
    asked = len(gateway.requests)
    reconciler = Reconciler(settings, [AAPL_1H])
    assert reconciler.run_tick(instance, "", now).lost == 2
    assert find_lost(settings, instance, now) == [("2024-03-01", "2024-04-01")]
    assert load_again(settings, instance, "2024-03-01", "2024-04-01")
    assert path.read_text() == before
    assert len(gateway.requests) == asked + 1
    assert set(partition_statuses(instance, AAPL_1H, settings, MONTHS).values()) == {"MATERIALIZED"}
    settled = reconciler.run_tick(instance, "", now + timedelta(minutes=10))
    assert (settled.reported, settled.lost, settled.problems) == (0, 0, [])


def test_what_cannot_be_brought_back_shows_as_failed(settings: Settings, instance: dg.DagsterInstance) -> None:
    """A run that finds no gateway: the month is failed instead of materialized, and no longer lost. A restored file ends it."""
    hold(settings.data_dir, AAPL_1H, utc("2024-01-01"), NOW, without=range(200, 210))
    record(instance, MONTHS)
    assert find_lost(settings, instance) == [("2024-02-01", "2024-02-01")]
    assert not load_again(settings, instance, "2024-02-01", "2024-02-01")
    found = partition_statuses(instance, AAPL_1H, settings, MONTHS)
    assert found == {**dict.fromkeys(MONTHS, "MATERIALIZED"), "2024-02-01": "FAILED"}
    assert reconcile(settings, instance).lost == 0
    hold(settings.data_dir, AAPL_1H, utc("2024-01-01"), NOW)
    assert reconcile(settings, instance).reported == 1
    assert set(partition_statuses(instance, AAPL_1H, settings, MONTHS).values()) == {"MATERIALIZED"}


def test_a_series_that_shared_a_failed_run_is_put_right(settings: Settings, instance: dg.DagsterInstance) -> None:
    """Dagster marks every partition that a failed run was going to touch and did not report: those that are complete in the
    files are materialized again after the next tick, those of the series that failed stay failed."""
    now = datetime.now(UTC)
    hold(settings.data_dir, AAPL_1H, now - timedelta(days=300), now)
    hold(settings.data_dir, MSFT_1H, now - timedelta(days=300), now - timedelta(days=100))
    for path in settings.data_dir.glob("*.csv"):
        os.utime(path, (now.timestamp() - 3600,) * 2)
    partitions = list(partitions_in(AAPL_1H.timeframe, Window(now - timedelta(days=95), now)))
    keys = [p.key for p in partitions]
    request = request_run(
        [AAPL_1H, MSFT_1H], partitions[0], partitions[-1], Mode.TAIL, origin="sensor", run_key="test"
    )  # fmt: skip
    assert not execute(settings, [AAPL_1H, MSFT_1H], instance, request).success
    Reconciler(settings, [AAPL_1H, MSFT_1H]).run_tick(instance, "", now)
    assert set(partition_statuses(instance, AAPL_1H, settings, keys).values()) == {"MATERIALIZED"}
    assert set(partition_statuses(instance, MSFT_1H, settings, keys).values()) == {"FAILED"}


def test_a_deleted_file_lost_all_its_partitions(settings: Settings, instance: dg.DagsterInstance) -> None:
    """Everything that was recorded, the unfinished month included, and nothing else."""
    record(instance, MONTHS)
    tick = reconcile(settings, instance)
    assert (tick.reported, tick.lost) == (0, 6)
    assert find_lost(settings, instance) == [("2024-01-01", "2024-06-01")]


def test_the_partitions_of_a_file_that_is_none_any_more_are_lost(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    """Overwritten with something else: listed with the reason in every round; the file is left alone."""
    record(instance, MONTHS[2:4])
    settings.data_dir.mkdir()
    path = settings.data_dir / "AAPL_1h.csv"
    path.write_text("shopping list\nmilk\n")
    reconciler = Reconciler(settings, [AAPL_1H])
    for _ in range(2):
        tick = reconciler.run_tick(instance, "", NOW)
        assert tick.problems[0].startswith("AAPL 1h: ")
        assert tick.lost == 2
    assert not load_again(settings, instance, *MONTHS[2:4])
    assert set(partition_statuses(instance, AAPL_1H, settings, MONTHS[2:4]).values()) == {"FAILED"}
    assert path.read_text() == "shopping list\nmilk\n"


def test_bars_after_the_last_held_one_are_the_tails(settings: Settings, instance: dg.DagsterInstance) -> None:
    """A file that stopped three weeks ago is no drift."""
    hold(settings.data_dir, AAPL_1H, utc("2024-01-01"), NOW - timedelta(days=21))
    record(instance, MONTHS)
    tick = reconcile(settings, instance)
    assert (tick.reported, tick.lost) == (0, 0)


# ---------------------------------------------------------------------------------------------------- ticks


def test_a_series_in_a_run_is_left_to_it(settings: Settings, instance: dg.DagsterInstance) -> None:
    """Whoever started the run: its end decides."""
    record(instance, MONTHS)
    job = build_defs(settings, [AAPL_1H]).resolve_implicit_global_asset_job_def()
    instance.create_run_for_job(
        job, status=dg.DagsterRunStatus.STARTED, asset_selection=frozenset([asset_key(AAPL_1H)])
    )
    tick = reconcile(settings, instance)
    assert (tick.in_runs, tick.looked_at, tick.lost) == (1, 0, 0)


def test_a_series_that_agrees_is_not_read_again_until_something_changes(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    """Neither files nor record changed: nothing to compare. A changed record is compared."""
    hold(settings.data_dir, AAPL_1H, utc("2024-01-01"), NOW)
    reconciler = Reconciler(settings, [AAPL_1H])
    seen = [reconciler.run_tick(instance, "", NOW) for _ in range(3)]
    assert [(t.looked_at, t.reported, t.unchanged) for t in seen] == [(1, 6, 0), (1, 0, 0), (0, 0, 1)]
    record(instance, ["2023-11-01"])
    for unchanged in (0, 1, 1):
        tick = reconciler.run_tick(instance, "", NOW)
        assert (tick.lost, tick.unchanged) == (1, unchanged)


def test_a_tick_that_takes_too_long_is_continued_by_the_next(settings: Settings, instance: dg.DagsterInstance) -> None:
    """The cursor names where to go on; a round that is complete starts anew."""
    for series in (AAPL_1H, MSFT_1H):
        hold(settings.data_dir, series, utc("2024-04-01"), NOW)
    reconciler = Reconciler(settings, [MSFT_1H, AAPL_1H])
    times = chain([0.0, 0.0], repeat(1000.0))  # time is up after the first series
    tick = reconciler.run_tick(instance, "", NOW, clock=lambda: next(times))
    assert (tick.reported, tick.cursor) == (3, "AAPL_1h")
    tick = reconciler.run_tick(instance, tick.cursor, NOW)
    assert (tick.reported, tick.cursor) == (3, "")


def test_an_instrument_that_cannot_be_judged_does_not_stop_the_others(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    """It is listed with its reason."""
    odd = Series(forex("EURUSD"), TIMEFRAMES["1h"])
    hold(settings.data_dir, AAPL_1H, utc("2024-04-01"), NOW)
    hold(settings.data_dir, odd, utc("2024-04-01"), NOW)
    (settings.data_dir / "EURUSD_1h.meta.json").write_text('{"version": 99}')
    tick = Reconciler(settings, [odd, AAPL_1H]).run_tick(instance, "", NOW)
    assert tick.reported == 3
    assert "newer version" in tick.problems[0]


def test_the_sensor_goes_round(settings: Settings, instance: dg.DagsterInstance) -> None:
    """Dagster's own evaluation: a round, a rest of ten minutes, and the next round begins with the first series again."""
    hold(settings.data_dir, AAPL_1H, utc("2024-04-01"), NOW)
    times = iter([NOW, NOW + timedelta(minutes=9), NOW + timedelta(minutes=10), NOW + timedelta(minutes=20)])
    sensor = make_reconcile_sensor(settings, [AAPL_1H], now=lambda: next(times))
    repository = build_defs(settings, [AAPL_1H]).get_repository_def()
    said, cursor = [], None
    for _ in range(4):
        data = sensor.evaluate_tick(
            dg.build_sensor_context(instance=instance, repository_def=repository, cursor=cursor)
        )
        said.append(data.skip_message or "")
        cursor = data.cursor or cursor
    assert "3 partitions reported" in said[0]
    assert "in 60 s" in said[1]
    assert "0 unchanged since" in said[2]
    assert "1 unchanged since" in said[3]


def test_a_round_over_many_partitions_is_one_tick(settings: Settings, instance: dg.DagsterInstance) -> None:
    """A thousand partitions of one series, whatever the clock says once it is begun."""
    daily = Series(stock("AAPL"), TIMEFRAMES["1m"])
    many = settings.model_copy(update={"partition_starts": {**settings.partition_starts, "1m": date(2020, 1, 1)}})
    start = HistoryStart(open=utc("2024-06-01"), known_by="test")
    hold(settings.data_dir, daily, utc("2024-06-01"), NOW)
    Store(settings.data_dir).write(daily, empty_bars(), answered=None, source="simulator", now=NOW, history_start=start)
    times = chain([0.0] * 2, repeat(1000.0))  # time is up after the first series
    tick = Reconciler(many, [daily]).run_tick(instance, "", NOW, clock=lambda: next(times))
    assert tick.is_round_over
    assert tick.reported == len(instance.get_materialized_partitions(asset_key(daily))) > 1100


def test_counts_do_not_depend_on_how_many_partitions_there_are() -> None:
    """Rows, missing and inner bars of a thousand partitions are those of each one judged alone."""
    from ktrdr_pipelines.calendars import expected_bars
    from ktrdr_pipelines.store.sidecar import Sidecar

    series = Series(stock("AAPL"), TIMEFRAMES["5m"])
    span = window("2023-12-31", "2024-06-02")
    opens = np.delete(expected_bars(series, span).opens, [5, 6, 7, 900, 901, 4000])
    partitions = list(partitions_in(series.timeframe, span))
    together = judge_partitions(series, partitions, opens, Sidecar(), grid_start=span.start, now=NOW)
    alone = [judge_partitions(series, [p], opens, Sidecar(), grid_start=span.start, now=NOW)[0] for p in partitions]
    assert together == alone
    assert sum(s.rows for s in together) == len(opens)
    assert sum(s.missing for s in together) == 6
