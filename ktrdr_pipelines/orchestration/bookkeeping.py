"""Stores many asset events of Dagster at once: one transaction for a batch instead of two or more for each event.

Dagster stores each event alone: on SQLite in the run's file and in the index, 5 to 10 ms of statement building and commits. Its
own batches help on PostgreSQL only, where `store_event_batch` writes one statement; on SQLite it is a loop, whatever
``DAGSTER_EVENT_BATCH_SIZE`` is (docs/dagster_facts.md, 13). So on SQLite a batch is written here, with the statements that the
storage itself prepares.

An event that a killed process did not store is no loss: the bars are in the file, and reconciling reports the partition.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, Protocol, runtime_checkable

import dagster as dg
from sqlalchemy import Connection

BATCH = 500
"""Events of one transaction: others wait for it, on SQLite for about 0.2 s."""
PATIENCE_S = 1.0
"""How long a finished partition may wait for others before it is stored."""

_RUNLESS = ""


@runtime_checkable
class AssetRows(Protocol):
    """What Dagster's SQL storages offer: the row of an asset, which names its newest materialization."""

    def store_asset_event(self, event: dg.EventLogEntry, event_id: int) -> None: ...


@runtime_checkable
class ShardedStorage(AssetRows, Protocol):
    """What Dagster's SQLite storage offers besides: a database for each run, and an index of all asset events."""

    def run_connection(self, run_id: str | None = None) -> AbstractContextManager[Connection]: ...

    def index_connection(self) -> AbstractContextManager[Connection]: ...

    def prepare_insert_event(self, event: dg.EventLogEntry) -> Any: ...

    def store_asset_event_tags(self, events: Sequence[dg.EventLogEntry], event_ids: Sequence[int]) -> None: ...


def make_entry(
    materialization: dg.AssetMaterialization,
    *,
    timestamp: float | None = None,
    run_id: str = _RUNLESS,
    job_name: str = "",
    step_key: str | None = None,
) -> dg.EventLogEntry:
    """The entry of the event log that Dagster makes of ``materialization``; by default one that belongs to no run.

    ``timestamp``: in seconds since 1970; None is now.
    """
    kind = dg.DagsterEventType.ASSET_MATERIALIZATION.value
    event = dg.DagsterEvent(
        kind,
        job_name,
        event_specific_data=_payload_type()(materialization),
        message=(materialization.description or "Materialized value.") if run_id else None,
        step_key=step_key,
    )
    at = time.time() if timestamp is None else timestamp
    return dg.EventLogEntry(  # type: ignore[no-untyped-call]
        error_info=None,
        level=logging.DEBUG if run_id else logging.INFO,
        user_message="",
        run_id=run_id,
        timestamp=at,
        step_key=step_key,
        job_name=job_name,
        dagster_event=event,
    )


@cache
def _payload_type() -> Callable[[dg.AssetMaterialization], Any]:
    """The class of a materialization event's payload. Dagster exports no name for it, so it is read from its stored form."""
    stored = dg.serialize_value(dg.AssetMaterialization("any"))
    payload = dg.deserialize_value(
        f'{{"__class__": "StepMaterializationData", "asset_lineage": [], "materialization": {stored}}}'
    )
    return type(payload)


def store_entries(instance: dg.DagsterInstance, entries: Sequence[dg.EventLogEntry]) -> None:
    """Store ``entries`` (asset events of one type and one run, or of none), `BATCH` in a transaction, in this order.

    The last entry of each asset is recorded as the asset's newest.
    """
    for start in range(0, len(entries), BATCH):
        _store(instance, entries[start : start + BATCH])


def report_partitions(instance: dg.DagsterInstance, materializations: Sequence[dg.AssetMaterialization]) -> None:
    """As `DagsterInstance.report_runless_asset_event` for each, in batches."""
    store_entries(instance, [make_entry(each) for each in materializations])


class FinishedPartitions:
    """Materializations of one step, stored in batches: when `BATCH` have gathered, or `PATIENCE_S` after the first.

    A step that waits calls `store_due` now and then, and `flush` at its end. Not for use by several threads.
    """

    def __init__(self, context: dg.AssetExecutionContext, clock: Callable[[], float] = time.monotonic) -> None:
        self._instance = context.instance
        self._run = context.run
        self._step_key = context.get_step_execution_context().step.key
        self._clock = clock
        self._waiting: list[dg.EventLogEntry] = []
        self._since = 0.0

    def add(self, materialization: dg.AssetMaterialization) -> None:
        """The partition of ``materialization`` is finished."""
        if not self._waiting:
            self._since = self._clock()
        run = self._run
        entry = make_entry(materialization, run_id=run.run_id, job_name=run.job_name, step_key=self._step_key)
        self._waiting.append(entry)
        if len(self._waiting) >= BATCH:
            self.flush()
        self.store_due()

    def store_due(self) -> None:
        """Store what waits if the first of it has waited for `PATIENCE_S`."""
        if self._waiting and self._clock() - self._since >= PATIENCE_S:
            self.flush()

    def flush(self) -> None:
        """Store what waits."""
        entries, self._waiting = self._waiting, []
        store_entries(self._instance, entries)


@contextmanager
def finished_partitions(context: dg.AssetExecutionContext) -> Iterator[FinishedPartitions]:
    """A `FinishedPartitions` that is flushed at the end of the block, also if the block fails or is interrupted."""
    finished = FinishedPartitions(context)
    try:
        yield finished
    finally:
        finished.flush()


def _insert(connection: Connection, statement: Any) -> int:
    """The id of the inserted row."""
    key = connection.execute(statement).inserted_primary_key
    assert key is not None
    return int(key[0])


def _store(instance: dg.DagsterInstance, entries: Sequence[dg.EventLogEntry]) -> None:
    storage = instance.event_log_storage
    newest = {entry.get_dagster_event().asset_key: i for i, entry in enumerate(entries)}
    if storage.is_run_sharded and isinstance(storage, ShardedStorage):
        statements = [storage.prepare_insert_event(entry) for entry in entries]
        if run_id := entries[0].run_id:
            with storage.run_connection(run_id) as connection:
                for statement in statements:
                    connection.execute(statement)
        with storage.index_connection() as connection:
            ids = [_insert(connection, statement) for statement in statements]
        storage.store_asset_event_tags(entries, ids)
        for i in newest.values():
            storage.store_asset_event(entries[i], ids[i])
        return
    # A batch records only its last entry as the newest one of its asset.
    for key in newest:
        storage.store_event_batch([entry for entry in entries if entry.get_dagster_event().asset_key == key])
