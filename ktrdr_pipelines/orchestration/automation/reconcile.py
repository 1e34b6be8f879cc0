"""Keep Dagster's partition status true to the files, both ways: a pure comparison, and the tick that acts on it.

Complete but not recorded (an adopted file, a load outside Dagster, windows before the start of history): reported. Recorded
but incomplete now (rows deleted, a file gone): asked for again, so that it is complete again or shows as failed. What is
complete is `planning/coverage.py`'s judgement, the same as the load's. Bars missing after the last held one are the tail's.
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
from ktrdr_pipelines.orchestration.automation.run_requests import request_run
from ktrdr_pipelines.orchestration.automation.tail import QUIET_S
from ktrdr_pipelines.orchestration.partition_definitions import define_partitions, first_partition_start
from ktrdr_pipelines.orchestration.runs.active import ActiveRuns, find_active_runs
from ktrdr_pipelines.planning.coverage import PartitionState, judge_partitions, known_span
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.schedule_overrides import open_store, refresh_calendars
from ktrdr_pipelines.store.sidecar import Sidecar
from ktrdr_pipelines.store.store import Store

MAX_BLOCK = 366
"""Partitions of one run that asks again: Dagster needs about 10 ms for each before the run starts."""
MAX_REQUESTS = 10
"""Runs asked for in one tick: each takes the daemon about a second (dagster_facts.md, 4)."""
REPORT_BUDGET_S = 20.0
"""How long a person who adopted a file waits for its partitions to be reported; 10 ms each, so some 2,000."""

MAX_REPORTS = 1000
"""Partitions reported in one tick, at 10 to 15 ms each (dagster_facts.md, 4)."""
TICK_BUDGET_S = 25.0
"""After this a tick stops and the next one goes on; Dagster gives up after 60 s."""
_LOCK_TIMEOUT_S = 2.0

MATERIALIZED, FAILED, IN_PROGRESS = "MATERIALIZED", "FAILED", "IN_PROGRESS"
"""Dagster's words for a partition's status; a partition without one is missing."""


@dataclass(frozen=True, slots=True)
class Drift:
    """``to_report``: complete by the files, not so by Dagster's record. ``to_request``: the other way round, as blocks of
    consecutive partitions, oldest first."""

    to_report: tuple[PartitionState, ...]
    to_request: tuple[tuple[Partition, ...], ...]

    def __bool__(self) -> bool:
        return bool(self.to_report or self.to_request)


def compare(states: Sequence[PartitionState], recorded: Mapping[str, str], max_block: int = MAX_BLOCK) -> Drift:
    """What differs between ``states`` (consecutive partitions, oldest first) and ``recorded`` (Dagster's status by key).

    Left alone: a partition in progress; one that failed and is incomplete, which is the truth; one of which nothing is known;
    and a recorded one that only lacks bars after the last held one, which the tail brings.
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
    """What one tick did and asks for. ``looked_at`` series were compared, ``unchanged`` ones had not changed since."""

    requests: list[dg.RunRequest] = field(default_factory=list)
    reported: int = 0
    looked_at: int = 0
    unchanged: int = 0
    going: int = 0
    notices: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    cursor: str = ""

    def describe(self) -> str:
        """One line for the tick's page."""
        said = [f"{self.looked_at} series compared with their files, {self.unchanged} unchanged since"]
        said.append(f"{self.reported} partitions reported" if self.reported else "nothing to ask for again")
        if self.going:
            said.append(f"{self.going} in a run that is still going")
        if self.problems:
            said.append(f"{len(self.problems)} cannot be judged, see the log")
        if self.cursor:
            said.append(f"the next tick goes on after {self.cursor}")
        return "; ".join(said)


class Reconciler:
    """Compares series by series, as many as fit into a tick, and remembers which have not changed since they agreed."""

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
        """Go on after the series named ``cursor``; from the first one when it is empty.

        Raises:
            StoreError: corrections of calendars cannot be read; without them nothing can be called complete.
        """
        tick = ReconcileTick()
        corrections = refresh_calendars(self._settings.data_dir)
        if corrections != self._corrections:
            self._corrections = corrections
            self._agreed.clear()
        until = clock() + TICK_BUDGET_S
        active = find_active_runs(instance, now)
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
            tick.going += 1
            return True
        # A store of its own, because a store keeps every sidecar it has read.
        store = Store(self._settings.data_dir, lock_timeout_s=_LOCK_TIMEOUT_S)
        marks = (_mark(store, series), record)
        if self._agreed.get(series.name) == marks:
            tick.unchanged += 1
            return True
        if _is_being_written(store, series, now):
            return True
        try:
            drift, is_settled = self._find_drift(series, store, instance, now, tick)
        except KtrdrError as error:
            tick.problems.append(f"{series}: {error}")
            return True
        tick.looked_at += 1
        if not drift:
            if is_settled:
                self._agreed[series.name] = (_mark(store, series), record)
            return True
        for state in drift.to_report:
            if tick.reported >= MAX_REPORTS or clock() > until:
                return False
            instance.report_runless_asset_event(_describe(series, state))
            tick.reported += 1
        for block in drift.to_request:
            if len(tick.requests) >= MAX_REQUESTS:
                return False
            first, last = block[0], block[-1]
            key = f"reconcile:{first.key}:{last.key}:{int(now.timestamp()) // 60}"
            tick.requests.append(request_run([series], first, last, Mode.FULL, origin="reconcile", run_key=key))
            tick.notices.append(f"{series}: {first.key} to {last.key} lost bars and is asked for again")
        return True

    def _find_drift(
        self, series: Series, store: Store, instance: dg.DagsterInstance, now: datetime, tick: ReconcileTick
    ) -> tuple[Drift, bool]:
        """The drift of one series, and whether nothing of it is in progress."""
        held = np.empty(0, dtype=np.int64)
        sidecar = Sidecar()
        try:
            tick.notices += [f"{series}: {said}" for said in store.prepare(series, now=now).describe()]
            sidecar = store.read_sidecar(series)
            held = store.held_opens(series)
        except DataError as error:
            # What cannot be read is not held: recorded partitions are asked for again, and fail with this reason.
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


def report_held(
    settings: Settings,
    instance: dg.DagsterInstance,
    series: Series,
    now: datetime,
    *,
    budget_s: float = REPORT_BUDGET_S,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[int, int]:
    """Report the partitions of ``series`` that its file holds and Dagster has no record of: how many were, and how many are left
    for the sensor because ``budget_s`` seconds were over. What the file lost is the sensor's to ask for.

    Raises:
        KtrdrError: the files cannot be read.
    """
    store = open_store(settings.data_dir)
    reconciler = Reconciler(settings, [series])
    drift, _ = reconciler._find_drift(series, store, instance, now, ReconcileTick())
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
        description="Found complete in the file; no run of Dagster's loaded it.",
        metadata=metadata,
    )


def _mark(store: Store, series: Series) -> object:
    """What changes when a file of the series does."""
    marks: list[tuple[int, int, int] | None] = []
    for path in (store.csv_path(series), store.sidecar_path(series)):
        try:
            state = path.stat()
        except FileNotFoundError:
            marks.append(None)
            continue
        marks.append((state.st_mtime_ns, state.st_size, state.st_ino))
    return tuple(marks)


def _is_being_written(store: Store, series: Series, now: datetime) -> bool:
    try:
        changed = datetime.fromtimestamp(store.csv_path(series).stat().st_mtime, UTC)
    except FileNotFoundError:
        return False
    return 0 <= (now - changed).total_seconds() < QUIET_S


def _read_records(instance: dg.DagsterInstance, universe: Sequence[Series]) -> dict[dg.AssetKey, object]:
    """By asset what changes when Dagster records anything of it; nothing for assets it has no record of."""
    return {
        record.asset_entry.asset_key: (
            record.asset_entry.last_materialization_storage_id,
            record.asset_entry.last_planned_materialization_storage_id,
            record.asset_entry.last_run_id,
        )
        for record in instance.get_asset_records([asset_key(s) for s in universe])
    }
