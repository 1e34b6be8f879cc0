"""Keeps Dagster's partition status equal to the files: a pure comparison, and the sensor tick that acts on it.

A complete partition without record (an adopted file, a load outside Dagster, windows before the start of history) is reported.
A recorded partition that is incomplete now (rows deleted, a file removed) is loaded again: it becomes complete or shows as
failed. `planning/coverage.py` decides what is complete, as for a load. Bars after the last held one are left to `tail.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import dagster as dg
import numpy as np

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import Mode
from ktrdr_pipelines.domain.partitions import Partition, partition_from_key, partitions_in
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import DataError, KtrdrError
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.automation.due import QUIET_S
from ktrdr_pipelines.orchestration.automation.run_requests import request_run
from ktrdr_pipelines.orchestration.partition_definitions import define_partitions
from ktrdr_pipelines.orchestration.runs.queries import ActiveRuns, find_active_runs
from ktrdr_pipelines.planning.coverage import PartitionState, judge_partitions, known_span
from ktrdr_pipelines.settings import Settings, first_partition_start
from ktrdr_pipelines.store.atomic import state_of
from ktrdr_pipelines.store.schedule_overrides import open_store, refresh_calendars
from ktrdr_pipelines.store.sidecar import Sidecar
from ktrdr_pipelines.store.store import Store

MAX_BLOCK = 366
"""Partitions in one run: Dagster needs about 10 ms for each before the run starts."""
MAX_REQUESTS = 10
"""Runs requested in one tick: each takes the daemon about a second (docs/dagster_facts.md, 4)."""
REPORT_BUDGET_S = 20.0
"""How long `ktrdr adopt` reports partitions; 10 ms each, so some 2,000."""

MAX_REPORTS = 1000
"""Partitions reported in one tick, at 10 to 15 ms each (docs/dagster_facts.md, 4)."""
TICK_BUDGET_S = 25.0
"""After this a tick stops and the next one continues; Dagster's time-out is 60 s."""
_LOCK_TIMEOUT_S = 2.0

MATERIALIZED, FAILED, IN_PROGRESS = "MATERIALIZED", "FAILED", "IN_PROGRESS"
"""Dagster's names of a partition's status; a partition without one is missing."""


@dataclass(frozen=True, slots=True)
class Drift:
    """``to_report``: complete in the files, not recorded as complete. ``to_request``: recorded as complete, incomplete in the
    files, as blocks of consecutive partitions, oldest first."""

    to_report: tuple[PartitionState, ...]
    to_request: tuple[tuple[Partition, ...], ...]

    def __bool__(self) -> bool:
        return bool(self.to_report or self.to_request)


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
    """One tick. ``looked_at`` series were compared, ``unchanged`` ones have not changed since they agreed."""

    requests: list[dg.RunRequest] = field(default_factory=list)
    reported: int = 0
    looked_at: int = 0
    unchanged: int = 0
    in_runs: int = 0
    notices: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    cursor: str = ""

    def describe(self) -> str:
        """One line for the tick's page."""
        parts = [f"{self.looked_at} series compared with their files, {self.unchanged} unchanged since"]
        parts.append(f"{self.reported} partitions reported" if self.reported else "nothing to load again")
        if self.in_runs:
            parts.append(f"{self.in_runs} in an unfinished run")
        if self.problems:
            parts.append(f"{len(self.problems)} cannot be read, see the log")
        if self.cursor:
            parts.append(f"the next tick continues after {self.cursor}")
        return "; ".join(parts)


class Reconciler:
    """Compares series after series, as many as fit into a tick, and remembers the state in which they agreed."""

    def __init__(self, settings: Settings, universe: Sequence[Series]) -> None:
        self._settings = settings
        self._universe = sorted(universe, key=lambda s: s.name)
        self._agreed: dict[str, object] = {}
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
            self._agreed.clear()
        until = clock() + TICK_BUDGET_S
        active = find_active_runs(instance)
        todo = [s for s in self._universe if s.name > cursor]
        records = _read_records(instance, todo) if todo else {}
        before = cursor
        for series in todo:
            is_over = clock() > until or tick.reported >= MAX_REPORTS or len(tick.requests) >= MAX_REQUESTS
            if is_over or not self._reconcile(
                series, instance, records.get(asset_key(series)), active, now, tick, until, clock
            ):
                tick.cursor = before
                break
            before = series.name
        return tick

    def _reconcile(
        self,
        series: Series,
        instance: dg.DagsterInstance,
        record: object,
        active: ActiveRuns,
        now: datetime,
        tick: ReconcileTick,
        until: float,
        clock: Callable[[], float],
    ) -> bool:
        """Compare one series, report and request. False if the tick ended before all of it was reported or requested."""
        if active.find(series):
            tick.in_runs += 1
            return True
        # A new store, because a store caches every sidecar it reads.
        store = Store(self._settings.data_dir, lock_timeout_s=_LOCK_TIMEOUT_S)
        marks = (_mark(store, series), record)
        if self._agreed.get(series.name) == marks:
            tick.unchanged += 1
            return True
        if _is_being_written(store, series, now):
            return True
        try:
            drift, is_settled = self.find_drift(series, store, instance, now, tick)
        except KtrdrError as error:
            tick.problems.append(f"{series}: {error}")
            return True
        tick.looked_at += 1
        if not drift:
            if is_settled:
                self._agreed[series.name] = (_mark(store, series), record)
            return True
        return _act(series, drift, instance, now, tick, lambda: clock() > until)

    def find_drift(
        self, series: Series, store: Store, instance: dg.DagsterInstance, now: datetime, tick: ReconcileTick
    ) -> tuple[Drift, bool]:
        """The drift of one series, and whether none of its partitions is in progress."""
        held = np.empty(0, dtype=np.int64)
        sidecar = Sidecar()
        try:
            tick.notices += [f"{series}: {text}" for text in store.prepare(series, now=now).describe()]
            sidecar = store.read_sidecar(series)
            held = store.held_opens(series)
        except DataError as error:
            # Treated as not held: recorded partitions are loaded again, and fail with this reason.
            tick.problems.append(f"{series}: {error}")
            held, sidecar = np.empty(0, dtype=np.int64), Sidecar()
        key, timeframe = asset_key(series), series.timeframe
        grid_start = first_partition_start(timeframe, self._settings)
        known = known_span(held, sidecar, grid_start)
        starts = [known.start] if known else []
        if recorded := instance.get_materialized_partitions(key):
            starts.append(partition_from_key(timeframe, min(recorded)).window.start)
        if not starts or max(min(starts), grid_start) >= now:
            return Drift((), ()), True
        partitions = list(partitions_in(timeframe, Window(max(min(starts), grid_start), now)))
        states = judge_partitions(series, partitions, held, sidecar, grid_start=grid_start, now=now)
        keys = [p.key for p in partitions]
        found = instance.get_status_by_partition(key, keys, self._definition(timeframe)) or {}
        statuses = {k: status.value for k, status in found.items() if status is not None}
        return compare(states, statuses), IN_PROGRESS not in statuses.values()

    def _definition(self, timeframe: Timeframe) -> dg.TimeWindowPartitionsDefinition:
        if timeframe not in self._definitions:
            self._definitions[timeframe] = define_partitions(timeframe, self._settings)
        return self._definitions[timeframe]


def _act(
    series: Series,
    drift: Drift,
    instance: dg.DagsterInstance,
    now: datetime,
    tick: ReconcileTick,
    is_over: Callable[[], bool],
) -> bool:
    """Report and request. False if the tick ended before all of ``drift``."""
    for state in drift.to_report:
        if tick.reported >= MAX_REPORTS or is_over():
            return False
        instance.report_runless_asset_event(_describe(series, state))
        tick.reported += 1
    for block in drift.to_request:
        if len(tick.requests) >= MAX_REQUESTS:
            return False
        first, last = block[0], block[-1]
        key = f"reconcile:{first.key}:{last.key}:{int(now.timestamp()) // 60}"
        tick.requests.append(request_run([series], first, last, Mode.FULL, origin="reconcile", run_key=key))
        tick.notices.append(f"{series}: {first.key} to {last.key} lost bars and is loaded again")
    return True


def report_held(
    settings: Settings,
    instance: dg.DagsterInstance,
    series: Series,
    now: datetime,
    *,
    budget_s: float = REPORT_BUDGET_S,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[int, int]:
    """Report the complete partitions of ``series`` that Dagster has no record of. Returns how many were reported, and how many
    are left to the sensor because ``budget_s`` seconds were over. Lost bars are left to the sensor.

    Raises:
        KtrdrError: the files cannot be read.
    """
    store = open_store(settings.data_dir)
    reconciler = Reconciler(settings, [series])
    drift, _ = reconciler.find_drift(series, store, instance, now, ReconcileTick())
    until = clock() + budget_s
    for done, state in enumerate(drift.to_report):
        if clock() > until:
            return done, len(drift.to_report) - done
        instance.report_runless_asset_event(_describe(series, state))
    return len(drift.to_report), 0


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
