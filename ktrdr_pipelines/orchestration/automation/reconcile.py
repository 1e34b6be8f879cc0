"""Keeps Dagster's partition status equal to the files: a pure comparison, and the sensor tick that reports what differs.

A complete partition without record (an adopted file, a load outside Dagster, a new home, windows before the start of history) is
reported. A recorded partition that is incomplete now (rows deleted, a file removed) is listed; `gap_fill` loads it again, and it
becomes complete or shows as failed. `planning/coverage.py` decides what is complete, as for a load. Bars after the last held one
are left to `tail.py`. Reports are stored in batches, so that the first round in a new home is one of a few ticks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import dagster as dg
import numpy as np

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.partitions import Partition, partition_from_key, partitions_in
from ktrdr_pipelines.domain.time import Window, format_instant, parse_instant
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import DataError, KtrdrError
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.automation.due import QUIET_S
from ktrdr_pipelines.orchestration.bookkeeping import BATCH, report_partitions
from ktrdr_pipelines.orchestration.partition_definitions import define_partitions, first_partition_start
from ktrdr_pipelines.orchestration.runs.queries import find_active_runs
from ktrdr_pipelines.planning.coverage import PartitionState, judge_partitions, known_span
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.atomic import state_of
from ktrdr_pipelines.store.schedule_overrides import open_store, refresh_calendars
from ktrdr_pipelines.store.sidecar import Sidecar
from ktrdr_pipelines.store.store import Store

MAX_BLOCK = 366
"""Lost partitions in one block, which is one run where they are loaded again: Dagster needs about 10 ms for each to start it."""
ROUND_EVERY_S = 600.0
"""From the end of one round over all series to the next one."""
TICK_INTERVAL_S = 60
TICK_BUDGET_S = 25.0
"""After this a tick stops and the next one continues; Dagster's time-out is 60 s."""
_LOCK_TIMEOUT_S = 2.0
_AFTER, _DONE = "after ", "done "
"""Cursors: in a round after a series, or a round ended at an instant."""

MATERIALIZED, FAILED, IN_PROGRESS = "MATERIALIZED", "FAILED", "IN_PROGRESS"
"""Dagster's names of a partition's status; a partition without one is missing."""


@dataclass(frozen=True, slots=True)
class Drift:
    """``to_report``: complete in the files, not recorded as complete. ``lost``: recorded as complete, incomplete in the files, as
    blocks of consecutive partitions, oldest first."""

    to_report: tuple[PartitionState, ...]
    lost: tuple[tuple[Partition, ...], ...]


def compare(states: Sequence[PartitionState], recorded: Mapping[str, str], max_block: int = MAX_BLOCK) -> Drift:
    """The differences between ``states`` (consecutive partitions, oldest first) and ``recorded`` (Dagster's status by key).

    Not a difference: a partition in progress; a failed one that is incomplete; one that was never requested; and a recorded
    one that only misses bars after the last held one, which the tail sensor loads.
    """
    to_report = []
    blocks: list[list[Partition]] = []
    last = -2
    for i, state in enumerate(states):
        status = recorded.get(state.partition.key)
        if state.is_complete and state.is_within_known and status not in (MATERIALIZED, IN_PROGRESS):
            to_report.append(state)
        elif status == MATERIALIZED and state.missing_before_last:
            if i != last + 1 or len(blocks[-1]) >= max_block:
                blocks.append([])
            blocks[-1].append(state.partition)
            last = i
    return Drift(tuple(to_report), tuple(tuple(block) for block in blocks))


@dataclass
class ReconcileTick:
    """One tick. ``looked_at`` series were compared, ``unchanged`` ones have not changed since they were. ``lost`` counts
    partitions that are recorded as complete and are not, in all series."""

    reported: int = 0
    lost: int = 0
    looked_at: int = 0
    unchanged: int = 0
    in_runs: int = 0
    notices: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    cursor: str = ""
    """The last series that was finished."""
    is_round_over: bool = True

    def describe(self) -> str:
        """One line for the tick's page."""
        parts = [f"{self.looked_at} series compared with their files, {self.unchanged} unchanged since"]
        parts.append(f"{self.reported} partitions reported" if self.reported else "nothing to report")
        if self.lost:
            parts.append(f"{self.lost} recorded partitions lost bars, see the log")
        if self.in_runs:
            parts.append(f"{self.in_runs} in an unfinished run")
        if self.problems:
            parts.append(f"{len(self.problems)} cannot be read, see the log")
        if not self.is_round_over:
            parts.append(f"the next tick continues after {self.cursor}" if self.cursor else "the next tick continues")
        return "; ".join(parts)


class Reconciler:
    """Compares series after series, as many as fit into a tick, and remembers the state in which they agreed."""

    def __init__(self, settings: Settings, universe: Sequence[Series]) -> None:
        self._settings = settings
        self._universe = sorted(universe, key=lambda s: s.name)
        self._compared: dict[str, tuple[object, int]] = {}
        """By name of the series the state in which there was nothing to report, and how many partitions were lost then."""
        self._corrections: object = None
        self._definitions: dict[Timeframe, dg.TimeWindowPartitionsDefinition] = {}

    def run_tick(
        self,
        instance: dg.DagsterInstance,
        cursor: str,
        now: datetime,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> ReconcileTick:
        """Continue after the series named ``cursor``; begin with the first one if it is empty.

        Raises:
            StoreError: corrections of calendars cannot be read; without them completeness cannot be decided.
        """
        tick = ReconcileTick()
        corrections = refresh_calendars(self._settings.data_dir)
        if corrections != self._corrections:
            self._corrections = corrections
            self._compared.clear()
        until = clock() + TICK_BUDGET_S
        active = find_active_runs(instance)
        todo = [s for s in self._universe if s.name > cursor]
        records = _read_records(instance, todo) if todo else {}
        found: list[dg.AssetMaterialization] = []
        before = cursor
        for series in todo:
            if clock() > until:
                tick.cursor, tick.is_round_over = before, False
                break
            if active.find(series):
                tick.in_runs += 1
            else:
                found += self._reconcile(series, instance, records.get(asset_key(series)), now, tick)
            if len(found) >= BATCH:
                report_partitions(instance, found)
                found = []
            before = series.name
        report_partitions(instance, found)
        return tick

    def _reconcile(
        self,
        series: Series,
        instance: dg.DagsterInstance,
        record: object,
        now: datetime,
        tick: ReconcileTick,
    ) -> list[dg.AssetMaterialization]:
        """Compare one series; returns what is to be reported of it."""
        # A new store, because a store caches every sidecar it reads.
        store = Store(self._settings.data_dir, lock_timeout_s=_LOCK_TIMEOUT_S)
        marks, lost = self._compared.get(series.name, (None, 0))
        if marks == (_mark(store, series), record):
            tick.unchanged += 1
            tick.lost += lost
            return []
        if _is_being_written(store, series, now):
            return []
        try:
            drift, is_settled = self.find_drift(series, store, instance, now, tick, is_recorded=record is not None)
        except KtrdrError as error:
            tick.problems.append(f"{series}: {error}")
            return []
        tick.looked_at += 1
        lost = sum(map(len, drift.lost))
        tick.lost += lost
        tick.notices += [f"{series}: {block[0].key} to {block[-1].key} lost bars" for block in drift.lost]
        if not drift.to_report and is_settled:
            self._compared[series.name] = ((_mark(store, series), record), lost)
        tick.reported += len(drift.to_report)
        return [_describe(series, state) for state in drift.to_report]

    def find_drift(
        self,
        series: Series,
        store: Store,
        instance: dg.DagsterInstance,
        now: datetime,
        tick: ReconcileTick,
        *,
        is_recorded: bool = True,
    ) -> tuple[Drift, bool]:
        """The drift of one series, and whether that is settled: its files can be read, none of its partitions is in progress.

        ``is_recorded``: False if Dagster has no record of the series at all, so that the status of partitions need not be asked.
        """
        held, sidecar, is_readable = np.empty(0, dtype=np.int64), Sidecar(), True
        try:
            tick.notices += [f"{series}: {text}" for text in store.prepare(series, now=now).describe()]
            sidecar = store.read_sidecar(series)
            held = store.held_opens(series)
        except DataError as error:
            # Treated as not held: recorded partitions count as lost.
            tick.problems.append(f"{series}: {error}")
            held, sidecar, is_readable = np.empty(0, dtype=np.int64), Sidecar(), False
        key, timeframe = asset_key(series), series.timeframe
        grid_start = first_partition_start(timeframe, self._settings)
        known = known_span(held, sidecar, grid_start)
        starts = [known.start] if known else []
        if is_recorded and (recorded := instance.get_materialized_partitions(key)):
            starts.append(partition_from_key(timeframe, min(recorded)).window.start)
        if not starts or max(min(starts), grid_start) >= now:
            return Drift((), ()), is_readable
        partitions = list(partitions_in(timeframe, Window(max(min(starts), grid_start), now)))
        states = judge_partitions(series, partitions, held, sidecar, grid_start=grid_start, now=now)
        keys = [p.key for p in partitions]
        found = instance.get_status_by_partition(key, keys, self._definition(timeframe)) if is_recorded else None
        statuses = {k: status.value for k, status in (found or {}).items() if status is not None}
        return compare(states, statuses), is_readable and IN_PROGRESS not in statuses.values()

    def _definition(self, timeframe: Timeframe) -> dg.TimeWindowPartitionsDefinition:
        if timeframe not in self._definitions:
            self._definitions[timeframe] = define_partitions(timeframe, self._settings)
        return self._definitions[timeframe]


def report_held(settings: Settings, instance: dg.DagsterInstance, series: Series, now: datetime) -> int:
    """Report the complete partitions of ``series`` that Dagster has no record of. Returns how many.

    Raises:
        KtrdrError: the files cannot be read.
    """
    store = open_store(settings.data_dir)
    reconciler = Reconciler(settings, [series])
    drift, _ = reconciler.find_drift(series, store, instance, now, ReconcileTick())
    report_partitions(instance, [_describe(series, state) for state in drift.to_report])
    return len(drift.to_report)


def _describe(series: Series, state: PartitionState) -> dg.AssetMaterialization:
    metadata: dict[str, dg.MetadataValue | int | bool] = {"dagster/row_count": state.rows, "reconciled": True}
    if state.first_open and state.last_open:
        metadata["first_bar"] = dg.MetadataValue.timestamp(state.first_open)
        metadata["last_bar"] = dg.MetadataValue.timestamp(state.last_open)
    return dg.AssetMaterialization(
        asset_key(series),
        partition=state.partition.key,
        description="Found complete in the file; no Dagster run loaded it.",
        metadata=metadata,
    )


def _mark(store: Store, series: Series) -> object:
    """The state of the files of the series."""
    return state_of(store.csv_path(series)), state_of(store.sidecar_path(series))


def _is_being_written(store: Store, series: Series, now: datetime) -> bool:
    try:
        changed = datetime.fromtimestamp(store.csv_path(series).stat().st_mtime, UTC)
    except FileNotFoundError:
        return False
    return 0 <= (now - changed).total_seconds() < QUIET_S


def _read_records(instance: dg.DagsterInstance, universe: Sequence[Series]) -> dict[dg.AssetKey, object]:
    """By asset a value that changes with every record of it; assets without record are left out."""
    return {
        record.asset_entry.asset_key: (
            record.asset_entry.last_materialization_storage_id,
            record.asset_entry.last_planned_materialization_storage_id,
            record.asset_entry.last_run_id,
        )
        for record in instance.get_asset_records([asset_key(s) for s in universe])
    }


def make_reconcile_sensor(
    settings: Settings, universe: Sequence[Series], *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> dg.SensorDefinition:
    """The sensor ``reconcile``: partitions that files have are reported, recorded ones that lost bars are listed."""
    reconciler = Reconciler(settings, universe)

    @dg.sensor(
        name="reconcile",
        asset_selection=dg.AssetSelection.all(),
        minimum_interval_seconds=TICK_INTERVAL_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Keeps partition status equal to the files: every ten minutes it reports partitions that are complete and "
        "not recorded, and lists recorded ones that lost bars.",
    )
    def reconcile(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        at = now()
        if (rested_s := _seconds_since_round(context.cursor, at)) < ROUND_EVERY_S:
            return dg.SensorResult(skip_reason=f"the next round begins in {ROUND_EVERY_S - rested_s:.0f} s")
        tick = reconciler.run_tick(context.instance, (context.cursor or "").partition(_AFTER)[2], at)
        for problem in tick.problems:
            context.log.warning(problem)
        for notice in tick.notices:
            context.log.info(notice)
        # Never empty: with an empty cursor Dagster keeps the old one.
        cursor = _DONE + format_instant(at) if tick.is_round_over else _AFTER + tick.cursor
        return dg.SensorResult(skip_reason=tick.describe(), cursor=cursor)

    return reconcile


def _seconds_since_round(cursor: str | None, now: datetime) -> float:
    """Since the end of the last round; infinite while one goes on."""
    done = (cursor or "").partition(_DONE)[2]
    return (now - parse_instant(done, "cursor")).total_seconds() if done else math.inf
