"""Promises of stored batches: they are the events that Dagster stores itself, and partition status follows from them."""

from collections.abc import Iterator
from itertools import chain, repeat

import dagster as dg
import pytest

from ktrdr_pipelines.orchestration import bookkeeping
from ktrdr_pipelines.orchestration.bookkeeping import (
    BATCH,
    FinishedPartitions,
    finished_partitions,
    make_entry,
    report_partitions,
    store_entries,
)

PARTITIONS = dg.DailyPartitionsDefinition("2020-01-01", end_date="2024-01-01")
DAYS = PARTITIONS.get_partition_keys()
KEYS = [dg.AssetKey(["ohlcv", name]) for name in ("AAPL_1m", "MSFT_1m")]
KEY = KEYS[0]


def describe(partition: str, key: dg.AssetKey = KEY) -> dg.AssetMaterialization:
    metadata = {"dagster/row_count": 390, "last_bar": dg.MetadataValue.timestamp(1.7e9)}
    return dg.AssetMaterialization(key, "found complete", metadata, partition)


def newest_of(instance: dg.DagsterInstance, key: dg.AssetKey = KEY) -> dg.EventLogEntry:
    (record,) = instance.fetch_materializations(key, limit=1).records
    return record.event_log_entry


def test_an_entry_is_the_one_that_dagster_makes(instance: dg.DagsterInstance) -> None:
    """Nothing differs but the time."""
    instance.report_runless_asset_event(describe("2023-01-01"))
    theirs = newest_of(instance)
    report_partitions(instance, [describe("2023-01-01")])
    ours = newest_of(instance)
    assert ours.timestamp > theirs.timestamp
    assert dg.serialize_value(ours).replace(str(ours.timestamp), "") == dg.serialize_value(theirs).replace(
        str(theirs.timestamp), ""
    )


def test_a_batch_marks_its_partitions(instance: dg.DagsterInstance) -> None:
    """Of several assets in one call, in more than one transaction; each asset's row names its last one."""
    count = BATCH + 10
    report_partitions(instance, [describe(day, key) for day in DAYS[:count] for key in KEYS])
    for key in KEYS:
        assert instance.get_materialized_partitions(key) == set(DAYS[:count])
        (record,) = instance.get_asset_records([key])
        newest = record.asset_entry.last_materialization_record
        assert newest is not None
        assert newest.partition_key == DAYS[count - 1]
        assert newest.storage_id == instance.fetch_materializations(key, limit=1).records[0].storage_id


def test_an_entry_has_the_time_it_is_given(instance: dg.DagsterInstance) -> None:
    """For a materialization that is recorded once more."""
    store_entries(instance, [make_entry(describe(DAYS[0]), timestamp=1.6e9)])
    assert newest_of(instance).timestamp == 1.6e9


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_step_records_its_partitions_in_batches(instance: dg.DagsterInstance, interrupted: bool) -> None:
    """They belong to the run and its step, also in the run's own records; and what waits is stored when the step fails."""

    @dg.asset(key=KEY, partitions_def=PARTITIONS, output_required=False)
    def bars(context: dg.AssetExecutionContext) -> Iterator[dg.AssetMaterialization]:
        with finished_partitions(context) as finished:
            for day in DAYS[:20]:
                finished.add(describe(day))
            if interrupted:
                raise dg.Failure("no gateway", allow_retries=False)
        yield from ()

    tags = {"dagster/asset_partition_range_start": DAYS[0], "dagster/asset_partition_range_end": DAYS[24]}
    result = dg.materialize([bars], instance=instance, tags=tags, raise_on_error=False)
    assert result.success is not interrupted
    found = instance.get_status_by_partition(KEY, DAYS[:25], PARTITIONS) or {}
    values = [found[day].value if found[day] else None for day in DAYS[:25]]  # type: ignore[union-attr]
    assert values == ["MATERIALIZED"] * 20 + (["FAILED"] if interrupted else [None]) * 5
    of_run = instance.all_logs(result.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
    assert [entry.get_dagster_event().partition for entry in of_run] == DAYS[:20]
    assert {(entry.step_key, entry.job_name) for entry in of_run} == {("ohlcv__AAPL_1m", result.dagster_run.job_name)}


def test_finished_partitions_do_not_wait_for_long(instance: dg.DagsterInstance) -> None:
    """A second after the first the batch is stored, so that the UI moves."""
    seen = []

    @dg.op
    def step(context: dg.OpExecutionContext) -> None:
        times = chain([0.0, 0.1, 0.2, 0.3, 1.4], repeat(9.0))
        finished = FinishedPartitions(context, clock=lambda: next(times))
        for day in DAYS[:4]:
            finished.add(describe(day))
            seen.append(len(instance.get_materialized_partitions(KEY)))
        finished.flush()
        seen.append(len(instance.get_materialized_partitions(KEY)))

    @dg.job
    def job() -> None:
        step()

    assert job.execute_in_process(instance=instance).success
    assert seen == [0, 0, 0, 4, 4]


def test_nothing_is_stored_of_nothing(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    """No transaction for an empty batch."""
    monkeypatch.setattr(bookkeeping, "_store", None)
    report_partitions(instance, [])
