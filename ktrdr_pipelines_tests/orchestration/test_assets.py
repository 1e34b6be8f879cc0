"""Promises of the assets: partitions are reported one by one and truly, failures show, one run serves many partitions.

Real Dagster instances, a real socket; nothing of Dagster is patched.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ktrdr_pipelines.definitions import build_defs
from ktrdr_pipelines.domain.calls import Waiting
from ktrdr_pipelines.domain.instruments import Series, forex, stock
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.partitions import partition_at, partitions_in
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.orchestration.assets import asset_key, op_name
from ktrdr_pipelines.orchestration.partition_definitions import define_partitions
from ktrdr_pipelines.orchestration.resources import GatewayResource
from ktrdr_pipelines.orchestration.runs.entry_points import EntryPoint, lend
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines.orchestration.runs.launch import execute_load
from ktrdr_pipelines.orchestration.runs.load_run import LoadRun
from ktrdr_pipelines.orchestration.runs.tags import RANGE_END_TAG, RANGE_START_TAG
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.server import GatewayThread
from ktrdr_pipelines.store.locks import SeriesLock
from ktrdr_pipelines.store.settle import Prepared
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines.universe.file import DEFAULT_UNIVERSE
from ktrdr_pipelines_tests.conftest import StartGateway
from ktrdr_pipelines_tests.fakes import MovingClock, window

AAPL_1H = Series(stock("AAPL"), TIMEFRAMES["1h"])
MakeSettings = Callable[..., Settings]

pytestmark = pytest.mark.slow


def materialize(
    settings: Settings, instance: dg.DagsterInstance, first: str, last: str = "", **config: object
) -> dg.ExecuteInProcessResult:
    """Run the AAPL 1h asset for one partition or a range, as Dagster does it."""
    job = build_defs(settings, [AAPL_1H]).resolve_implicit_global_asset_job_def()
    where = (
        {"tags": {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}}
        if last
        else {"partition_key": first}
    )
    return job.execute_in_process(
        instance=instance,
        asset_selection=[asset_key(AAPL_1H)],
        raise_on_error=False,
        run_config={"ops": {op_name(AAPL_1H): {"config": config}}, "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        **where,  # type: ignore[arg-type]
    )  # fmt: skip


def materializations(instance: dg.DagsterInstance) -> list[dg.AssetMaterialization]:
    """What is recorded of AAPL 1h, the newest first."""
    records = instance.fetch_materializations(asset_key(AAPL_1H), limit=100).records
    return [record.asset_materialization for record in records if record.asset_materialization]


def statuses(instance: dg.DagsterInstance, settings: Settings, keys: list[str]) -> dict[str, str | None]:
    """Partition status as the UI shows it."""
    found = instance.get_status_by_partition(asset_key(AAPL_1H), keys, define_partitions(AAPL_1H.timeframe, settings))
    return {key: status.value if status else None for key, status in (found or {}).items()}


def test_one_partition_arrives_in_the_csv_and_is_materialized(
    start_gateway: StartGateway, make_settings: MakeSettings, instance: dg.DagsterInstance
) -> None:
    """Materializing a month asks for that month only, writes its bars and reports the partition with its metadata."""
    gateway = start_gateway()
    settings = make_settings(gateway.port)
    result = materialize(settings, instance, "2024-03-01")
    assert result.success
    (event,) = materializations(instance)
    assert event.partition == "2024-03-01"
    assert event.metadata["dagster/row_count"].value == 140
    assert str(event.metadata["closes"].value).startswith("![closing prices](data:image/svg+xml;base64,")
    assert len(str(event.metadata["closes"].value)) < 1000
    with (settings.data_dir / "AAPL_1h.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["timestamp", "open", "high", "low", "close", "volume"]
    assert rows[1][0] == "2024-03-01T14:30:00Z"
    assert rows[-1][0] == "2024-03-28T19:00:00Z"
    assert len(rows) == 141
    assert {c.check_name: c.passed for c in result.get_asset_check_evaluations()} == {
        "bars_schema": True,
        "completeness": True,
    }


def test_a_range_is_one_run_whose_failed_partitions_show_as_failed(
    start_gateway: StartGateway, make_settings: MakeSettings, instance: dg.DagsterInstance
) -> None:
    """A range with one request that fails for good: the others are materialized, that month is failed, outside is missing;
    the next run asks for the failed month alone."""
    faults = [
        FaultRule(kind="error", code=162, text="Historical Market Data Service error message:Kaputt", nth=(3, 4, 5, 6))
    ]
    gateway = start_gateway(faults)
    settings = make_settings(gateway.port, open_requests=1)  # faults go by the number of a request
    clock = MovingClock()  # retries repeat the request, which pacing allows every 15 seconds only
    history = IBHistory(GatewayResource.of(settings).address(), clock=clock, sleep=clock.sleep)
    with history, lend(EntryPoint(history=history)):
        _check_a_failing_range(settings, instance, gateway)


def test_a_failing_series_of_a_run_turns_only_its_own_partitions_red(
    start_gateway: StartGateway, make_settings: MakeSettings, instance: dg.DagsterInstance
) -> None:
    """Two of three series in one run: IB refuses one of them. The other is complete, the one left out is not touched."""
    gateway = start_gateway([FaultRule(kind="error", code=162, text="No market data permissions", symbol="MSFT")])
    settings = make_settings(gateway.port)
    series = [Series(stock(symbol), TIMEFRAMES["1h"]) for symbol in ("AAPL", "MSFT", "GOOG")]
    keys = ["2024-01-01", "2024-02-01", "2024-03-01"]
    result = (
        build_defs(settings, series)
        .resolve_implicit_global_asset_job_def()
        .execute_in_process(
            instance=instance,
            asset_selection=[asset_key(each) for each in series[:2]],
            raise_on_error=False,
            tags={RANGE_START_TAG: keys[0], RANGE_END_TAG: keys[-1]},
        )
    )
    assert not result.success
    partitions = define_partitions(series[0].timeframe, settings)
    found = {
        each.instrument.symbol: {
            status.value if status else None
            for status in (instance.get_status_by_partition(asset_key(each), keys, partitions) or {}).values()
        }
        for each in series
    }
    assert found == {"AAPL": {"MATERIALIZED"}, "MSFT": {"FAILED"}, "GOOG": set()}
    checks = {(c.asset_key, c.check_name): c.passed for c in result.get_asset_check_evaluations()}
    assert checks[asset_key(series[0]), "completeness"]
    assert not checks[asset_key(series[1]), "completeness"]


def _check_a_failing_range(settings: Settings, instance: dg.DagsterInstance, gateway: GatewayThread) -> None:
    result = materialize(settings, instance, "2024-01-01", "2024-05-01")
    assert not result.success
    keys = ["2023-12-01", "2024-01-01", "2024-02-01", "2024-03-01", "2024-04-01", "2024-05-01", "2024-06-01"]
    found = statuses(instance, settings, keys)
    assert found["2024-01-01"] == "MATERIALIZED"
    assert found["2024-03-01"] == "FAILED"
    assert found["2024-05-01"] == "MATERIALIZED"
    assert found["2023-12-01"] is None
    assert found["2024-06-01"] is None
    checks = {c.check_name: c.passed for c in result.get_asset_check_evaluations()}
    assert checks == {"bars_schema": True, "completeness": False}
    asked = len(gateway.requests)
    assert materialize(settings, instance, "2024-01-01", "2024-05-01").success
    assert len(gateway.requests) == asked + 1
    assert set(statuses(instance, settings, keys[1:6]).values()) == {"MATERIALIZED"}


def test_a_partition_of_which_only_a_part_was_asked_for_stays_missing(
    start_gateway: StartGateway, make_settings: MakeSettings, instance: dg.DagsterInstance
) -> None:
    """Run config that cuts the window loads the part and does not claim the whole partition."""
    gateway = start_gateway()
    settings = make_settings(gateway.port)
    assert materialize(settings, instance, "2024-03-01", start="2024-03-11").success
    assert statuses(instance, settings, ["2024-03-01"]) == {"2024-03-01": None}
    extent = Store(settings.data_dir).extent(AAPL_1H)
    assert extent is not None
    assert extent.first_open_s >= window("2024-03-11", "2024-03-12").start_s


def test_nothing_missing_needs_no_gateway(
    start_gateway: StartGateway, make_settings: MakeSettings, instance: dg.DagsterInstance, unused_port: int
) -> None:
    """A partition that is held is reported without any connection."""
    settings = make_settings(start_gateway().port)
    assert materialize(settings, instance, "2024-03-01").success
    assert materialize(make_settings(unused_port), instance, "2024-03-01").success


def test_a_run_prepares_the_file_once(
    start_gateway: StartGateway,
    make_settings: MakeSettings,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The load takes over what the asset prepared; what was corrected is in the report once."""
    settings = make_settings(start_gateway().port)
    prepared: list[Series] = []
    prepare = Store.prepare

    def count(store: Store, series: Series, **more: Any) -> Prepared:
        prepared.append(series)
        return prepare(store, series, **more)

    monkeypatch.setattr(Store, "prepare", count)
    assert materialize(settings, instance, "2024-03-01").success
    assert prepared == [AAPL_1H]
    csv_path = Store(settings.data_dir).csv_path(AAPL_1H)
    csv_path.write_bytes(b"".join(line + b"\n" for i, line in enumerate(csv_path.read_bytes().splitlines()) if i != 9))
    entry_point = EntryPoint()
    with lend(entry_point):
        assert materialize(settings, instance, "2024-03-01").success
    assert prepared == [AAPL_1H] * 2
    (report,) = entry_point.reports
    assert (report.fetched_bars, [notice.count("edited") for notice in report.notices]) == (1, [1])


def test_a_gateway_that_is_gone_fails_the_run_and_says_so(
    make_settings: MakeSettings, instance: dg.DagsterInstance, unused_port: int
) -> None:
    """The failure of the run names the series, the window, the port and what to do."""
    result = materialize(make_settings(unused_port), instance, "2024-03-01")
    assert not result.success
    (failure,) = [e for e in result.all_events if e.is_step_failure]
    text = failure.step_failure_data.user_failure_data.description
    assert "AAPL 1h" in text
    assert f"no gateway at 127.0.0.1:{unused_port}" in text
    assert statuses(instance, make_settings(unused_port), ["2024-03-01"]) == {"2024-03-01": "FAILED"}


def test_a_malformed_run_config_is_refused_in_one_sentence(
    make_settings: MakeSettings, instance: dg.DagsterInstance, unused_port: int
) -> None:
    """A date that is none stops the run before anything is asked."""
    result = materialize(make_settings(unused_port), instance, "2024-03-01", start="yesterday")
    assert not result.success
    (failure,) = [e for e in result.all_events if e.is_step_failure]
    assert "start 'yesterday' is not a date" in failure.step_failure_data.user_failure_data.description


def test_execute_load_tags_its_run_and_returns_the_report(
    start_gateway: StartGateway, make_settings: MakeSettings, instance: dg.DagsterInstance
) -> None:
    """A load of the command line is a Dagster run like every other."""
    settings = make_settings(start_gateway().port)
    span = window("2024-01-10", "2024-03-05")
    request = LoadRequest("AAPL", AAPL_1H.timeframe, Mode.FULL, span.start, span.end)
    run_of_load = LoadRun(AAPL_1H, request, span, None, "cli")
    report, run_id = execute_load(settings, instance, run_of_load, entry_point=EntryPoint())
    assert report.status == "success"
    assert sorted(report.completed) == ["2024-02-01"]
    run = instance.get_run_by_id(run_id)
    assert run is not None
    assert run.tags["ktrdr/origin"] == "cli"
    assert run.tags["ktrdr/mode"] == "full"


def test_definitions_hold_one_asset_per_series_and_share_partitions(make_settings: MakeSettings) -> None:
    """The asset graph is the universe; assets of one timeframe share one partitions definition object."""
    defs = build_defs(make_settings(4001), DEFAULT_UNIVERSE)
    graph = defs.resolve_asset_graph()
    assert sorted(k.to_user_string() for k in graph.get_all_asset_keys()) == sorted(
        "/".join(series.asset_path) for series in DEFAULT_UNIVERSE
    )
    assert len({graph.get(asset_key(s)).partitions_def for s in DEFAULT_UNIVERSE if s.timeframe.name == "1h"}) == 1


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://ktrdr:hunter2@db/pacing", "postgresql+psycopg://ktrdr:***@db/pacing"),
        ("postgresql+psycopg://db/pacing?user=ktrdr&password=hunter2", "postgresql+psycopg://db/pacing?password=hidden&user=ktrdr"),
        ("hunter2@db", "(not a database URL)"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_password_of_the_ledger_is_used_and_never_shown(make_settings: MakeSettings, url: str, shown: str) -> None:
    """What Dagster stores and shows of the definitions holds no password; the resource in a run has it."""
    settings = make_settings(4002, ledger_url=url)
    job = build_defs(settings, [AAPL_1H]).resolve_implicit_global_asset_job_def()
    record = dg.serialize_value(job.get_job_snapshot())
    assert "hunter2" not in record
    assert f'\\"ledger_url\\": \\"{shown}\\"' in record
    with GatewayResource.of(settings).process_config_and_initialize_cm() as gateway:
        address = gateway.address()
    assert address.ledger_url == url
    assert "hunter2" not in repr(address)


@pytest.mark.parametrize("name", ["1m", "5m", "1h", "1d", "1w"])
def test_our_partition_grid_is_dagsters(make_settings: MakeSettings, name: str) -> None:
    """Keys and windows of the pure grid equal those of Dagster's definition, Fridays and leap years included."""
    timeframe = TIMEFRAMES[name]
    definition = define_partitions(timeframe, make_settings(4001))
    span = window("2023-11-20", "2024-04-10")
    ours = list(partitions_in(timeframe, span))
    keys = definition.get_partition_keys_in_time_window(dg.TimeWindow(ours[0].window.start, ours[-1].window.end))
    assert [p.key for p in ours] == list(keys)
    for partition in ours:
        theirs = definition.time_window_for_partition_key(partition.key)
        assert partition.window == Window(theirs.start.astimezone(UTC), theirs.end.astimezone(UTC))


def test_the_unfinished_window_is_a_partition_too(make_settings: MakeSettings) -> None:
    """Today's month exists as a partition before it has ended."""
    definition = define_partitions(TIMEFRAMES["1h"], make_settings(4001))
    assert definition.get_last_partition_key() == partition_at(TIMEFRAMES["1h"], datetime.now(UTC)).key


def test_several_series_share_one_run_and_one_connection(
    start_gateway: StartGateway, make_settings: MakeSettings, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    """Two assets in one run: both arrive over one client id."""
    gateway = start_gateway()
    settings = make_settings(gateway.port)
    euro = Series(forex("EURUSD"), TIMEFRAMES["1h"])
    job = build_defs(settings, [AAPL_1H, euro]).resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(instance=instance, partition_key="2024-03-01", raise_on_error=False)
    assert result.success
    assert {r.client_id for r in gateway.requests} == {1}
    assert len(Store(settings.data_dir).held_opens(euro)) > 480


def test_waits_show_in_the_run_log_and_in_the_metadata(
    start_gateway: StartGateway, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """A retry and the wait for pacing behind it: in the log of the run, with the configuration that a fresh home gets, and as
    numbers beside the partition."""
    gateway = start_gateway([FaultRule(kind="error", text="odd", nth=(1,))])
    settings = make_settings(gateway.port, dagster_home=tmp_path / "fresh home", ib_retry_waits_s=(2.0,))
    clock = MovingClock()
    history = IBHistory(GatewayResource.of(settings).address(), clock=clock, sleep=clock.sleep)
    with open_instance(settings) as instance, history, lend(EntryPoint(history=history)):
        result = materialize(settings, instance, "2024-03-01")
        log = [entry.user_message for entry in instance.all_logs(result.run_id)]
        (event,) = materializations(instance)
    assert any("try 2 of 2 in 2 s" in line and "odd" in line for line in log)
    assert any("pacing: no identical request within 15 seconds" in line for line in log)
    metadata = {
        name: event.metadata[name].value for name in ("retries_of_run", "retry_wait_s_of_run", "pacing_wait_s_of_run")
    }
    assert metadata["retries_of_run"] == 1
    assert metadata["retry_wait_s_of_run"] == 2.0
    assert metadata["pacing_wait_s_of_run"] == pytest.approx(13.5, abs=1.5)


def test_a_run_waits_for_another_load_of_its_series_and_reports_it(
    start_gateway: StartGateway, make_settings: MakeSettings, instance: dg.DagsterInstance
) -> None:
    settings = make_settings(start_gateway().port)
    waits: list[Waiting] = []
    another_load = SeriesLock(settings.data_dir, AAPL_1H)
    assert another_load.try_acquire() == ""

    def end_the_other(waiting: Waiting) -> None:
        waits.append(waiting)
        another_load.release()

    with lend(EntryPoint(on_wait=end_the_other)):
        result = materialize(settings, instance, "2024-03-01")
    assert result.success
    (waiting,) = waits
    assert waiting.until is None
    assert "another load of AAPL 1h" in waiting.reason
    assert f"process {os.getpid()}" in waiting.reason
    messages = [entry.user_message for entry in instance.all_logs(result.run_id)]
    assert any(waiting.reason in message for message in messages)
