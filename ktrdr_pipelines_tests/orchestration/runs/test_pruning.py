"""Promises of pruning: partition status, newest metadata and recent failures are the same afterwards, whatever the history.

Real runs on real instances. Their ages are tags, so that no test waits.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from ktrdr_pipelines.orchestration.automation.retention import KeepRules
from ktrdr_pipelines.orchestration.runs import pruning
from ktrdr_pipelines.orchestration.runs.pruning import ORIGINAL_RUN, PruneReport, prune
from ktrdr_pipelines_tests.holding import make_run
from ktrdr_pipelines_tests.postgres_server import throw_away_cluster

PARTITIONS = dg.MonthlyPartitionsDefinition("2024-01-01", end_date="2024-07-01")
MONTHS = PARTITIONS.get_partition_keys()
KEYS = [dg.AssetKey(["ohlcv", name]) for name in ("AAPL_1h", "MSFT_1h", "SPY_1h")]
RULES = KeepRules(automatic=timedelta(days=3), failed=timedelta(days=30), user=timedelta(days=365))
SENSOR = {"dagster/sensor_name": "tail_fill", "ktrdr/origin": "sensor"}
USER = {"ktrdr/origin": "cli"}
AGE = "test/age_days"

pytestmark = pytest.mark.slow


class Outcome(dg.Config):
    """``good`` partitions are materialized, the run fails if ``fails``."""

    good: list[str]
    fails: bool = False
    label: str = ""


@dg.multi_asset(
    name="ohlcv_1h",
    specs=[dg.AssetSpec(key, skippable=True) for key in KEYS],
    check_specs=[dg.AssetCheckSpec("completeness", asset=key) for key in KEYS],
    partitions_def=PARTITIONS,
    can_subset=True,
    backfill_policy=dg.BackfillPolicy.single_run(),
)
def bars(context: dg.AssetExecutionContext, config: Outcome) -> Iterator[dg.AssetMaterialization | dg.AssetCheckResult]:
    for key in sorted(context.selected_asset_keys):
        for partition in sorted(set(config.good) & set(context.partition_keys)):
            yield dg.AssetMaterialization(key, partition=partition, metadata={"label": config.label})
        yield dg.AssetCheckResult(asset_key=key, check_name="completeness", passed=not config.fails)
    if config.fails:
        raise dg.Failure(f"failed: {config.label}", allow_retries=False)


JOB = dg.Definitions([bars], executor=dg.in_process_executor).resolve_implicit_global_asset_job_def()


def load(
    instance: dg.DagsterInstance,
    first: str,
    last: str,
    *,
    age: float,
    keys: list[dg.AssetKey] | None = None,
    good: list[str] | None = None,
    fails: bool = False,
    tags: Mapping[str, str] = SENSOR,
) -> str:
    """A finished run, ``age`` days old; older ones have to be made first."""
    where = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
    good = [m for m in MONTHS if first <= m <= last] if good is None else good
    config = {"good": good, "fails": fails, "label": f"{first} {age:.3f}"}
    result = JOB.execute_in_process(
        instance=instance,
        asset_selection=keys or KEYS,
        tags={**tags, **where, AGE: str(age)},
        raise_on_error=False,
        run_config={
            "ops": {"ohlcv_1h": {"config": config}},
            "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
        },
    )
    return result.run_id


def find_expiry(run: dg.DagsterRun, ended: datetime) -> datetime | None:
    """By `RULES`; the age is the tag's."""
    return RULES.find_expiry(run, ended - timedelta(days=float(run.tags.get(AGE, "0"))))


def prune_now(instance: dg.DagsterInstance, *, dry_run: bool = False) -> PruneReport:
    return prune(instance, find_expiry, datetime.now(UTC) + timedelta(seconds=1), dry_run=dry_run)


def status_of(instance: dg.DagsterInstance) -> dict[tuple[str, str], str | None]:
    """Status of every partition of every asset, computed afresh."""
    found = {}
    for key in KEYS:
        instance.wipe_asset_cached_status([key])
        statuses = instance.get_status_by_partition(key, MONTHS, PARTITIONS) or {}
        found |= {(key.path[1], p): s.value if s else None for p, s in statuses.items()}
    return found


def newest_of(instance: dg.DagsterInstance) -> dict[tuple[str, str], tuple[object, float]]:
    """Label and time of the newest materialization of each partition."""
    found = {}
    for key in KEYS:
        for partition in MONTHS:
            chosen = dg.AssetRecordsFilter(key, asset_partitions=[partition])
            for record in instance.fetch_materializations(chosen, limit=1).records:
                assert record.asset_materialization is not None
                label = record.asset_materialization.metadata["label"].value
                found[key.path[1], partition] = (label, record.timestamp)
    return found


def newest_of_assets(instance: dg.DagsterInstance) -> dict[str, float]:
    """Time of what the asset's page and its freshness policy look at."""
    found = {}
    for record in instance.get_asset_records(KEYS):
        if (newest := record.asset_entry.last_materialization_record) is not None:
            found[record.asset_entry.asset_key.path[1]] = newest.timestamp
    return found


def checks_of(instance: dg.DagsterInstance) -> dict[str, bool]:
    """The newest verdict of each check."""
    found = {}
    for key in KEYS:
        record = instance.get_latest_asset_check_evaluation_record(dg.AssetCheckKey(key, "completeness"))
        if record is not None and record.event is not None:
            found[key.path[1]] = record.event.get_dagster_event().asset_check_evaluation_data.passed
    return found


def failures_of(instance: dg.DagsterInstance) -> dict[str, str]:
    """Reason of every failed run of the last thirty days, and of all failed runs of users."""
    found = {}
    for run in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE])):
        if float(run.tags[AGE]) < 30 or run.tags.get("ktrdr/origin") == "cli":
            (event,) = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
            found[run.run_id] = str(event.get_dagster_event().step_failure_data.error)
    return found


def make_history(instance: dg.DagsterInstance, seed: int, runs: int = 14) -> None:
    """Random runs: of sensors and users, complete, partial, failed, of one day to two years of age."""
    chance = random.Random(seed)
    for age in sorted((chance.choice([1, 2, 5, 20, 60, 400]) + chance.random() for _ in range(runs)), reverse=True):
        first, last = sorted(chance.choices(range(len(MONTHS)), k=2))
        span = MONTHS[first : last + 1]
        load(
            instance,
            span[0],
            span[-1],
            age=age,
            keys=chance.sample(KEYS, chance.randint(1, len(KEYS))),
            good=[m for m in span if chance.random() < 0.7],
            fails=chance.random() < 0.4,
            tags=chance.choice([SENSOR, SENSOR, USER]),
        )


def look_at(instance: dg.DagsterInstance) -> list[object]:
    looks = (status_of, newest_of, newest_of_assets, checks_of, failures_of)
    return [look(instance) for look in looks]


@pytest.mark.parametrize("seed", range(4))
def test_nothing_that_is_shown_changes(instance: dg.DagsterInstance, seed: int) -> None:
    """Whatever the history, pruned twice."""
    make_history(instance, seed)
    before = look_at(instance)
    report = prune_now(instance)
    assert look_at(instance) == before
    assert report.runs_removed > 0
    again = prune_now(instance)
    assert (again.runs_removed, again.partitions_recorded_again) == (0, 0)
    assert look_at(instance) == before


@contextmanager
def on_postgres(home: Path) -> Iterator[dg.DagsterInstance]:
    with throw_away_cluster("dagster") as socket:
        url = f"postgresql+psycopg2://ktrdr@/dagster?host={socket}"
        home.mkdir()
        (home / "dagster.yaml").write_text(f"storage:\n  postgres:\n    postgres_url: {url}\n")
        with dg.DagsterInstance.from_config(str(home)) as instance:
            yield instance


@pytest.mark.postgres
def test_the_same_on_postgresql(tmp_path: Path) -> None:
    """The other storage that Dagster has."""
    pytest.importorskip("dagster_postgres")
    with on_postgres(tmp_path / "home") as instance:
        make_history(instance, seed=7)
        before = look_at(instance)
        assert prune_now(instance).runs_removed > 0
        assert look_at(instance) == before


def test_the_old_run_is_noted(instance: dg.DagsterInstance) -> None:
    """A partition whose run is removed names that run, and keeps the time of the load."""
    old = load(instance, "2024-01-01", "2024-02-01", age=10)
    load(instance, "2024-02-01", "2024-03-01", age=1)
    report = prune_now(instance)
    assert (report.runs_removed, report.partitions_recorded_again) == (1, 3)
    assert instance.get_run_by_id(old) is None
    chosen = dg.AssetRecordsFilter(KEYS[0], asset_partitions=["2024-01-01"])
    (record,) = instance.fetch_materializations(chosen, limit=1).records
    assert record.asset_materialization is not None
    assert record.asset_materialization.metadata[ORIGINAL_RUN].value == old


def test_nothing_is_left_of_a_removed_run(instance: dg.DagsterInstance) -> None:
    """No event, no file, no tag, no check evaluation."""
    old = [load(instance, "2024-01-01", "2024-02-01", age=age) for age in (20, 10)]
    new = load(instance, "2024-01-01", "2024-02-01", age=1)
    prune_now(instance)
    home = Path(instance.root_directory)
    assert not [path for path in home.rglob("*") if any(run_id in path.name for run_id in old)]
    assert [path for path in home.rglob("*") if new in path.name]
    assert {r.run_id for r in instance.fetch_materializations(KEYS[0], limit=100).records} == {new}
    history = instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(KEYS[0], "completeness"), limit=100
    )
    assert not {record.run_id for record in history} & set(old)
    assert ["10"] not in [values for key, values in instance.get_run_tags(tag_keys=[AGE])]


def test_a_dry_run_changes_nothing(instance: dg.DagsterInstance) -> None:
    """Only the report shows what would be removed."""
    load(instance, "2024-01-01", "2024-02-01", age=10)
    report = prune_now(instance, dry_run=True)
    assert (report.runs_removed, report.partitions_recorded_again) == (1, 6)
    assert instance.get_runs_count() == 1
    assert prune_now(instance).runs_removed == 1


def test_a_failure_that_a_partition_shows_stays(instance: dg.DagsterInstance) -> None:
    """However old: the failed run, and the run of the materialization before the failure."""
    held = [
        load(instance, "2024-01-01", "2024-01-01", age=90),
        load(instance, "2024-01-01", "2024-01-01", age=80, good=[], fails=True),
    ]
    gone = load(instance, "2024-02-01", "2024-02-01", age=70)
    report = prune_now(instance)
    assert (report.runs_removed, report.runs_kept_for_status) == (1, 2)
    assert {run.run_id for run in instance.get_runs()} == set(held)
    assert status_of(instance)["AAPL_1h", "2024-01-01"] == "FAILED"
    # Loaded at last: no status needs them.
    load(instance, "2024-01-01", "2024-01-01", age=1)
    assert prune_now(instance).runs_removed == 2
    assert status_of(instance)["AAPL_1h", "2024-01-01"] == "MATERIALIZED"
    assert instance.get_run_by_id(gone) is None


def test_runs_in_progress_and_other_jobs_are_not_touched(instance: dg.DagsterInstance) -> None:
    """Neither a run that goes on nor what it is about to load; nor runs of assets that are not series."""
    load(instance, "2024-01-01", "2024-02-01", age=10)
    load(instance, "2024-03-01", "2024-03-01", age=9)
    where = {"dagster/asset_partition_range_start": "2024-01-01", "dagster/asset_partition_range_end": "2024-02-01"}
    going_on = instance.create_run_for_job(
        JOB,
        status=dg.DagsterRunStatus.STARTED,
        asset_selection=frozenset(KEYS),
        tags={**SENSOR, **where, AGE: "9"},
        run_config={"ops": {"ohlcv_1h": {"config": {"good": []}}}},
    )
    other = make_run(instance, is_ours=False, tags={**SENSOR, AGE: "500"}, status=dg.DagsterRunStatus.STARTED)
    instance.report_run_failed(other)
    before = status_of(instance)
    assert before["AAPL_1h", "2024-01-01"] == "IN_PROGRESS"
    report = prune_now(instance)
    assert (report.runs_removed, report.runs_kept_for_status) == (1, 1)
    assert instance.has_run(going_on.run_id)
    assert instance.has_run(other.run_id)
    assert status_of(instance) == before
    # The run is canceled: what was there before is there again.
    instance.report_run_canceled(going_on)
    assert status_of(instance)["AAPL_1h", "2024-01-01"] == "MATERIALIZED"


def test_a_home_is_pruned_while_a_run_loads(instance: dg.DagsterInstance) -> None:
    """In the middle of a step: what it recorded before and records after stays, as do its log and its lock."""
    old = [load(instance, "2024-01-01", "2024-03-01", age=age) for age in (20, 10)]

    @dg.asset(key=KEYS[0], partitions_def=PARTITIONS, output_required=False)
    def loading(context: dg.AssetExecutionContext) -> Iterator[dg.AssetMaterialization]:
        yield dg.AssetMaterialization(KEYS[0], partition="2024-01-01", metadata={"label": "before"})
        report = prune_now(context.instance)
        assert (report.runs_removed, report.runs_kept_for_status) == (1, 1)
        yield dg.AssetMaterialization(KEYS[0], partition="2024-02-01", metadata={"label": "after"})
        raise dg.Failure("the gateway is gone", allow_retries=False)

    tags = {"dagster/asset_partition_range_start": "2024-01-01", "dagster/asset_partition_range_end": "2024-03-01"}
    result = dg.materialize([loading], instance=instance, tags={**tags, AGE: "0"}, raise_on_error=False)
    assert not result.success
    assert {run.run_id for run in instance.get_runs()} == {result.run_id, old[1]}
    found = status_of(instance)
    assert [found["AAPL_1h", month] for month in MONTHS[:3]] == ["MATERIALIZED", "MATERIALIZED", "FAILED"]
    assert [found["MSFT_1h", month] for month in MONTHS[:3]] == ["MATERIALIZED"] * 3
    newest = newest_of(instance)
    assert [newest["AAPL_1h", month][0] for month in MONTHS[:2]] == ["before", "after"]


@pytest.mark.parametrize("step", ["_copy", "delete_check_evaluations", "delete_tags", "delete_run_files", "compact"])
def test_an_interruption_loses_nothing(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Killed at any step: status is true, and the next time finishes."""
    make_history(instance, seed=11, runs=8)
    before = look_at(instance)

    def interrupted(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pruning, step, interrupted)
        prune_now(instance)
    assert look_at(instance) == before
    prune_now(instance)
    assert look_at(instance) == before
    assert prune_now(instance).runs_removed == 0
