"""Removes runs with their logs, events, check evaluations and ticks from Dagster's records, and keeps partition status true.

Deleting a run deletes its materializations too, and with them the status of partitions (docs/dagster_facts.md, 13). So the newest
materialization of each partition is recorded once more, without a run, with its metadata and its time, before its run is
deleted. Runs stay that show in the status of a partition as failed or in progress, and the run of that partition's newest
materialization: recorded again it would count as newer than the failure.

The order makes an interruption harmless: record again, look whether it is so, delete events and files, delete the run. What is
left over is deleted by the next time. Runs that go on meanwhile are not touched, nor what they record.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice

import dagster as dg

from ktrdr_pipelines.orchestration.bookkeeping import AssetRows, make_entry, store_entries
from ktrdr_pipelines.orchestration.runs.leftovers import (
    compact,
    delete_check_evaluations,
    delete_run_files,
    delete_tags,
    measure_home,
)
from ktrdr_pipelines.orchestration.runs.tags import PARTITION_TAG, RANGE_END_TAG, RANGE_START_TAG

ORIGINAL_RUN, ORIGINAL_TIME = "original_run", "original_time"
"""Metadata of a materialization that was recorded again: the deleted run, and when that run recorded it."""

TICKS_KEPT = timedelta(days=30)

logger = logging.getLogger(__name__)

_Status = dg.DagsterRunStatus
_FINISHED = [_Status.SUCCESS, _Status.FAILURE, _Status.CANCELED]
_MATERIALIZATION = dg.DagsterEventType.ASSET_MATERIALIZATION
_PAGE = 500


@dataclass
class PruneReport:
    """What was removed; with ``dry_run`` what would be. Sizes are of the whole home in bytes, None on PostgreSQL."""

    dry_run: bool = False
    runs_examined: int = 0
    runs_removed: int = 0
    runs_kept_for_status: int = 0
    """Expired, but the status of a partition needs them."""
    partitions_recorded_again: int = 0
    files_before: int = 0
    files_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0

    def as_dict(self) -> dict[str, int]:
        """Plain values for JSON."""
        return dict(vars(self))

    def describe(self) -> list[str]:
        """A few lines for a terminal or a log."""
        verb = "to remove" if self.dry_run else "removed"
        lines = [f"{self.runs_removed:,} of {self.runs_examined:,} finished runs {verb}"]
        if self.runs_kept_for_status:
            lines.append(f"{self.runs_kept_for_status:,} expired runs kept: a partition's status needs them")
        lines.append(f"{self.partitions_recorded_again:,} partitions recorded again without their run")
        if not self.dry_run:
            lines.append(
                f"the Dagster home: {self.bytes_before / 1e6:,.1f} MB in {self.files_before:,} files before, "
                f"{self.bytes_after / 1e6:,.1f} MB in {self.files_after:,} files after"
            )
        return lines


@dataclass(frozen=True, slots=True)
class _Run:
    """What is needed of an expired run. ``span``: its first and last partition key; None: any partition."""

    run_id: str
    keys: frozenset[dg.AssetKey]
    span: tuple[str, str] | None


@dataclass
class _Plan:
    """``endangered``: by asset the storage ids of the newest materializations of partitions that expired runs made, by
    partition. ``held``: expired runs that must stay."""

    endangered: dict[dg.AssetKey, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    held: set[str] = field(default_factory=set)


def prune(
    instance: dg.DagsterInstance,
    find_expiry: Callable[[dg.DagsterRun, datetime], datetime | None],
    now: datetime,
    *,
    earliest: timedelta = timedelta(0),
    dry_run: bool = False,
    log: Callable[[str], object] = logger.debug,
) -> PruneReport:
    """Remove the runs that ``find_expiry`` (of a finished run and its end) names an instant before ``now`` for.

    ``earliest``: no run expires sooner after its end; newer ones are not even read. ``log`` receives progress.
    """
    report = PruneReport(dry_run=dry_run)
    report.files_before, report.bytes_before = measure_home(instance)
    expired = _find_expired(instance, find_expiry, now, now - earliest, report)
    plan = _plan(instance, expired)
    removable = [run for run in expired if run.run_id not in plan.held]
    report.runs_kept_for_status = len(expired) - len(removable)
    removable = _record_again(instance, plan, removable, report)
    report.runs_removed = len(removable)
    if not dry_run:
        for done, batch in enumerate(_batches(removable), 1):
            _delete(instance, batch)
            log(f"{min(done * _PAGE, len(removable)):,} of {len(removable):,} runs removed")
        _purge_ticks(instance, now)
        compact(instance)
    report.files_after, report.bytes_after = measure_home(instance)
    return report


def _find_expired(
    instance: dg.DagsterInstance,
    find_expiry: Callable[[dg.DagsterRun, datetime], datetime | None],
    now: datetime,
    updated_before: datetime,
    report: PruneReport,
) -> list[_Run]:
    expired = []
    for record in _read_finished(instance, updated_before):
        report.runs_examined += 1
        run = record.dagster_run
        ended = datetime.fromtimestamp(record.end_time or record.update_timestamp.timestamp(), UTC)
        expiry = find_expiry(run, ended)
        if expiry is not None and expiry <= now:
            expired.append(_Run(run.run_id, frozenset(run.asset_selection or ()), _find_span(run)))
    return expired


def _read_finished(instance: dg.DagsterInstance, updated_before: datetime) -> Iterator[dg.RunRecord]:
    """Oldest first, page by page."""
    filters = dg.RunsFilter(statuses=_FINISHED, updated_before=updated_before)
    cursor = None
    while page := instance.get_run_records(filters, limit=_PAGE, ascending=True, cursor=cursor):
        yield from page
        cursor = page[-1].dagster_run.run_id


def _find_span(run: dg.DagsterRun) -> tuple[str, str] | None:
    if RANGE_START_TAG in run.tags and RANGE_END_TAG in run.tags:
        return run.tags[RANGE_START_TAG], run.tags[RANGE_END_TAG]
    one = run.tags.get(PARTITION_TAG)
    return (one, one) if one else None


def _plan(instance: dg.DagsterInstance, expired: Sequence[_Run]) -> _Plan:
    plan = _Plan()
    ids = {run.run_id for run in expired}
    by_asset: dict[dg.AssetKey, list[_Run]] = defaultdict(list)
    for run in expired:
        for key in run.keys:
            by_asset[key].append(run)
    for key, runs in by_asset.items():
        blocked = _find_blocked(instance, key)
        plan.held |= ids & set(blocked.values())
        newest = instance.get_latest_storage_id_by_partition(key, _MATERIALIZATION)
        spans = {run.span for run in runs}
        touched = {p: at for p, at in newest.items() if _is_touched(p, spans)}
        for record in _read_materializations(instance, key, list(touched.values())):
            partition = record.partition_key
            if partition is None or record.run_id not in ids:
                continue
            if partition in blocked:
                plan.held.add(record.run_id)
            else:
                plan.endangered[key][partition] = record.storage_id
    return plan


def _is_touched(partition: str, spans: set[tuple[str, str] | None]) -> bool:
    """Keys are dates, so that their order is that of time."""
    return any(span is None or span[0] <= partition <= span[1] for span in spans)


def _find_blocked(instance: dg.DagsterInstance, key: dg.AssetKey) -> Mapping[str, str]:
    """By partition the run whose failed or unfinished attempt is newer than every materialization."""
    attempts = instance.event_log_storage.get_latest_asset_partition_materialization_attempts_without_materializations(
        key
    )
    run_ids = sorted({run_id for run_id, _ in attempts.values()})
    shown = set()
    for start in range(0, len(run_ids), _PAGE):
        for run in instance.get_runs(dg.RunsFilter(run_ids=run_ids[start : start + _PAGE])):
            if run.status not in (_Status.SUCCESS, _Status.CANCELED):
                shown.add(run.run_id)
    return {partition: run_id for partition, (run_id, _) in attempts.items() if run_id in shown}


def _read_materializations(
    instance: dg.DagsterInstance, key: dg.AssetKey, storage_ids: Sequence[int]
) -> Iterator[dg.EventLogRecord]:
    for start in range(0, len(storage_ids), _PAGE):
        chosen = dg.AssetRecordsFilter(asset_key=key, storage_ids=storage_ids[start : start + _PAGE])
        yield from instance.fetch_materializations(chosen, limit=_PAGE).records


def _record_again(
    instance: dg.DagsterInstance, plan: _Plan, removable: Sequence[_Run], report: PruneReport
) -> list[_Run]:
    """Record the endangered materializations of ``removable``; returns those runs of which nothing is endangered any more."""
    ids = {run.run_id for run in removable}
    for key, endangered in plan.endangered.items():
        blocked = _find_blocked(instance, key)  # a run may have begun since
        records = []
        for record in _read_materializations(instance, key, list(endangered.values())):
            if record.partition_key in blocked:
                ids.discard(record.run_id)
            elif record.run_id in ids:
                records.append(record)
        report.partitions_recorded_again += len(records)
        if report.dry_run or not records:
            continue
        _copy(instance, key, records)
        newest = instance.get_latest_storage_id_by_partition(key, _MATERIALIZATION)
        ids -= {r.run_id for r in records if newest.get(r.partition_key or "", 0) <= r.storage_id}
    return [run for run in removable if run.run_id in ids]


def _copy(instance: dg.DagsterInstance, key: dg.AssetKey, records: Sequence[dg.EventLogRecord]) -> None:
    """Record ``records`` of the asset ``key`` once more, oldest first, and keep which materialization is the asset's newest."""
    before = _newest_of_asset(instance, key)
    entries = []
    for record in sorted(records, key=lambda r: r.timestamp):
        made = record.asset_materialization
        assert made is not None
        note: dict[str, dg.MetadataValue] = {
            ORIGINAL_RUN: dg.MetadataValue.text(record.run_id),
            ORIGINAL_TIME: dg.MetadataValue.timestamp(record.timestamp),
        }
        copy = dg.AssetMaterialization(
            made.asset_key, made.description, {**note, **made.metadata}, made.partition, made.tags
        )
        entries.append(make_entry(copy, timestamp=record.timestamp))
    store_entries(instance, entries)
    storage = instance.event_log_storage
    if before is None or before.storage_id in {r.storage_id for r in records} or not isinstance(storage, AssetRows):
        return
    now = _newest_of_asset(instance, key)
    if now is not None and now.run_id == "" and now.timestamp <= before.timestamp:
        storage.store_asset_event(before.event_log_entry, before.storage_id)


def _newest_of_asset(instance: dg.DagsterInstance, key: dg.AssetKey) -> dg.EventLogRecord | None:
    """The materialization that the asset's page and its freshness are about."""
    for record in instance.get_asset_records([key]):
        return record.asset_entry.last_materialization_record
    return None


def _delete(instance: dg.DagsterInstance, runs: Sequence[_Run]) -> None:
    """Delete ``runs``, each one's record last: while it is there, the next time finds what is left."""
    ids = [run.run_id for run in runs]
    delete_check_evaluations(instance, ids)
    delete_tags(instance, ids)
    for run_id in ids:
        instance.event_log_storage.delete_events(run_id)
        delete_run_files(instance, run_id)
        instance.run_storage.delete_run(run_id)


def _purge_ticks(instance: dg.DagsterInstance, now: datetime) -> None:
    for state in instance.all_instigator_state():
        instance.purge_ticks(state.instigator_origin_id, state.selector_id, (now - TICKS_KEPT).timestamp())


def _batches(runs: Sequence[_Run]) -> Iterator[list[_Run]]:
    rest = iter(runs)
    while batch := list(islice(rest, _PAGE)):
        yield batch
