"""Promises of the rules by which runs expire, and of the daily job and the command that apply them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
from click.testing import CliRunner

from ktrdr_pipelines.cli.main import cli
from ktrdr_pipelines.definitions import build_defs
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.orchestration.automation.retention import KeepRules, make_retention_schedule
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines.orchestration.runs.queries import ActiveRuns, find_active_runs
from ktrdr_pipelines.orchestration.runs.tags import RETENTION_JOB
from ktrdr_pipelines.settings import Settings

AAPL_1H = Series(stock("AAPL"), TIMEFRAMES["1h"])
KEY = dg.AssetKey(["ohlcv", "AAPL_1h"])
RULES = KeepRules(automatic=timedelta(days=3), failed=timedelta(days=30), user=timedelta(days=365))
ENDED = datetime(2024, 3, 1, tzinfo=UTC)
BY_SENSOR = {"dagster/sensor_name": "tail_fill", "ktrdr/origin": "sensor"}
_Status = dg.DagsterRunStatus


@pytest.mark.parametrize(
    ("tags", "status", "days"),
    [
        (BY_SENSOR, _Status.SUCCESS, 3),
        (BY_SENSOR, _Status.FAILURE, 30),
        (BY_SENSOR, _Status.CANCELED, 30),
        ({"dagster/schedule_name": "tail_1d"}, _Status.SUCCESS, 3),
        ({"ktrdr/origin": "reconcile"}, _Status.SUCCESS, 3),
        ({"ktrdr/origin": "cli"}, _Status.SUCCESS, 365),
        ({"ktrdr/origin": "api"}, _Status.FAILURE, 365),
        ({"ktrdr/origin": "notebook"}, _Status.CANCELED, 365),
        ({"dagster/backfill": "abc"}, _Status.SUCCESS, 365),
        ({}, _Status.SUCCESS, 365),
        (BY_SENSOR, _Status.STARTED, None),
        (BY_SENSOR, _Status.STARTING, None),
        ({"ktrdr/origin": "cli"}, _Status.CANCELING, None),
    ],
)
def test_how_long_a_run_is_kept(tags: dict[str, str], status: dg.DagsterRunStatus, days: int | None) -> None:
    """By who started it and how it ended; a run that goes on never expires."""
    run = dg.DagsterRun("__ASSET_JOB", asset_selection=frozenset([KEY]), tags=tags, status=status)
    assert RULES.find_expiry(run, ENDED) == (None if days is None else ENDED + timedelta(days=days))


@pytest.mark.parametrize(
    ("job", "selection", "is_ours"),
    [
        ("__ASSET_JOB", [KEY], True),
        ("__ASSET_JOB", [dg.AssetKey(["ohlcv", "AAPL", "1h"])], True),
        (RETENTION_JOB, None, True),
        ("__ASSET_JOB", [KEY, dg.AssetKey("prices")], False),
        ("__ASSET_JOB", [], False),
        ("nightly_report", None, False),
    ],
)
def test_only_runs_of_series_expire(job: str, selection: list[dg.AssetKey] | None, is_ours: bool) -> None:
    """Assets and jobs of the user do not."""
    chosen = frozenset(selection) if selection is not None else None
    run = dg.DagsterRun(job, asset_selection=chosen, tags=BY_SENSOR, status=_Status.SUCCESS)
    assert (RULES.find_expiry(run, ENDED) is not None) == is_ours


def test_failures_are_kept_by_the_longer_rule() -> None:
    """Where successful runs are kept for longer than failed ones, failed ones are too."""
    rules = KeepRules(automatic=timedelta(days=90), failed=timedelta(days=30), user=timedelta(days=365))
    run = dg.DagsterRun("__ASSET_JOB", asset_selection=frozenset([KEY]), tags=BY_SENSOR, status=_Status.FAILURE)
    assert rules.find_expiry(run, ENDED) == ENDED + timedelta(days=90)


def make_runs(instance: dg.DagsterInstance, settings: Settings) -> list[str]:
    """Three finished runs: two of the sensor, one of a user. None of them loads anything."""
    job = build_defs(settings, [AAPL_1H]).resolve_implicit_global_asset_job_def()
    made = []
    for tags in (BY_SENSOR, BY_SENSOR, {"ktrdr/origin": "cli"}):
        run = instance.create_run_for_job(
            job, asset_selection=frozenset([KEY]), tags={**tags, "dagster/partition": "2024-03-01"}
        )
        instance.report_run_canceled(run)
        made.append(run.run_id)
    return made


@pytest.mark.slow
def test_the_daily_job_removes_what_expired(
    make_settings: Callable[..., Settings], unused_port: int, instance: dg.DagsterInstance
) -> None:
    """The job of the schedule, executed; a day after that, its own run is old enough too."""
    settings = make_settings(unused_port)
    user = make_runs(instance, settings)[-1]
    days = [20, 40]
    schedule = make_retention_schedule(settings, now=lambda: datetime.now(UTC) + timedelta(days=days.pop(0)))
    for left in (4, 2):  # canceled runs of sensors stay for thirty days; the job's own run for three
        result = schedule.job.execute_in_process(instance=instance, tags={"ktrdr/origin": "schedule"})
        assert result.success
        assert instance.get_runs_count() == left
    assert instance.has_run(user)


def test_the_job_is_no_load(
    make_settings: Callable[..., Settings], unused_port: int, instance: dg.DagsterInstance
) -> None:
    """It has no selection of assets, as a job that loads everything: sensors do not wait for it."""
    schedule = make_retention_schedule(make_settings(unused_port))
    instance.create_run_for_job(schedule.job, status=_Status.STARTED)
    assert find_active_runs(instance) == ActiveRuns({})


@pytest.mark.slow
def test_the_command(make_settings: Callable[..., Settings], unused_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run counts, the command removes; JSON on stdout. Without a home nothing is created."""
    settings = make_settings(unused_port)
    for name, value in {
        "DAGSTER_HOME": str(settings.dagster_home),
        "KTRDR_DATA_DIR": str(settings.data_dir),
        "KTRDR_KEEP_FAILED_RUNS": "0.05",
        "KTRDR_KEEP_AUTOMATIC_RUNS": "0.05",
    }.items():
        monkeypatch.setenv(name, value)
    assert json.loads(CliRunner().invoke(cli, ["prune", "--json"]).stdout)["runs_examined"] == 0
    assert not settings.dagster_home.exists()
    with open_instance(settings) as instance:
        make_runs(instance, settings)
    found = CliRunner().invoke(cli, ["prune", "--dry-run"])
    assert found.exit_code == 0, found.output
    assert "0 of 0 finished runs to remove" in found.stdout  # younger than the shortest rule: not even read
