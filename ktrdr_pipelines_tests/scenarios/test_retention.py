"""Bars of 30 seconds and less: IB's retention is six months, and an empty answer about older bars is no evidence."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from ktrdr_pipelines.definitions import build_defs
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.orchestration.assets import asset_key, op_name
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.conftest import Ktrdr, StartGateway

AAPL_30S = Series(stock("AAPL"), TIMEFRAMES["30s"])

pytestmark = pytest.mark.slow


def kept() -> datetime:
    found = AAPL_30S.timeframe.retained_from(datetime.now(UTC))
    assert found is not None
    return found


def weekday(day: datetime, step: int) -> datetime:
    """``day``, or the next one in steps of ``step`` days that is a weekday."""
    while day.weekday() > 4:
        day += timedelta(days=step)
    return day


def test_a_load_begins_at_ibs_retention_and_reports_it(ktrdr: Ktrdr) -> None:
    """Two years are requested, six months are available; minutes have no limit."""
    start, end = f"{datetime.now(UTC) - timedelta(days=730):%Y-%m-%d}", f"{kept() + timedelta(days=3):%Y-%m-%d}"
    arguments = ("ib-load", "AAPL", "30s", "--start", start, "--dry-run", "--json")
    done = ktrdr(*arguments, "--end", end)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["start"] == format_instant(kept())
    assert [text for text in report["notices"] if text.startswith("30s bars before ") and "IB's retention" in text]
    refused = ktrdr(*arguments, "--end", f"{kept() - timedelta(days=1):%Y-%m-%d}")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "six months" in refused.stderr
    assert TIMEFRAMES["1m"].retained_from(datetime.now(UTC)) is None


def test_older_partitions_fail_and_nothing_of_them_is_recorded_as_absent(
    start_gateway: StartGateway, make_settings: Callable[..., Settings], instance: dg.DagsterInstance
) -> None:
    """Also for runs from the UI: one across the limit loads what is available; one before it fails without a request."""
    gateway = start_gateway()
    settings: Settings = make_settings(gateway.port)
    job = build_defs(settings, [AAPL_30S]).resolve_implicit_global_asset_job_def()

    def run(first: datetime, last: datetime) -> dg.ExecuteInProcessResult:
        return job.execute_in_process(
            instance=instance,
            asset_selection=[asset_key(AAPL_30S)],
            raise_on_error=False,
            run_config={
                "ops": {op_name(AAPL_30S): {"config": {}}},
                "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
            },
            tags={
                "dagster/asset_partition_range_start": f"{first:%Y-%m-%d}",
                "dagster/asset_partition_range_end": f"{last:%Y-%m-%d}",
            },
        )

    before = weekday(kept() - timedelta(days=4), -1)
    assert not run(before, before).success
    assert [request for request in gateway.requests if request.duration] == []
    assert run(before, weekday(kept() + timedelta(days=5), 1)).success  # beyond any long weekend
    store = Store(settings.data_dir)
    assert store.read_sidecar(AAPL_30S).proven_empty == ()
    extent = store.extent(AAPL_30S)
    assert extent is not None
    assert extent.first >= kept()


def test_a_report_names_no_file_that_is_not_there(start_gateway: StartGateway, ktrdr: Ktrdr) -> None:
    """A day without a bar: nothing was written, so users are not sent to a file. JSON keeps the path."""
    port = start_gateway().port
    arguments = ("ib-load", "AAPL", "1h", "--start", "2024-03-02", "--end", "2024-03-04")
    done = ktrdr(*arguments, port=port)
    assert done.returncode == 0, done.stderr
    assert "AAPL_1h.csv" not in done.stdout
    assert "0 of 1 partition complete" in done.stdout
    assert json.loads(ktrdr(*arguments, "--json", port=port).stdout)["merged_file"].endswith("AAPL_1h.csv")
