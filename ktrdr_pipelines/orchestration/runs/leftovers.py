"""What Dagster leaves when it deletes a run: check evaluations, tags (SQLite), the run's database file, logs; and free pages.

Dagster has no call for these, so rows are deleted from its tables by name, over the connections of its storages. Where a table
does not exist or has other columns nothing is deleted.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

import dagster as dg
import sqlalchemy as sa

_SPARE = 0.3
"""Share of free pages in a database file from which it is worth rewriting."""
_WORTH_B = 8_000_000
_AT_ONCE = 500


@runtime_checkable
class _IndexedStorage(Protocol):
    def index_connection(self) -> AbstractContextManager[sa.Connection]: ...


@runtime_checkable
class _RunStorage(Protocol):
    def connect(self) -> AbstractContextManager[sa.Connection]: ...


@runtime_checkable
class _FileStorage(Protocol):
    def path_for_shard(self, run_id: str) -> str: ...


def delete_check_evaluations(instance: dg.DagsterInstance, run_ids: Sequence[str]) -> None:
    """Delete the check evaluations of ``run_ids``, except the newest of each check (and partition)."""
    storage = instance.event_log_storage
    if not isinstance(storage, _IndexedStorage):
        return
    with storage.index_connection() as connection:
        table = _find_table(
            connection, "asset_check_executions", "id", "run_id", "asset_key", "check_name", "partition"
        )
        if table is None:
            return
        newest = sa.select(sa.func.max(table.c.id)).group_by(table.c.asset_key, table.c.check_name, table.c.partition)
        kept = list(connection.execute(newest).scalars())
        for start in range(0, len(run_ids), _AT_ONCE):
            of_runs = table.c.run_id.in_(run_ids[start : start + _AT_ONCE])
            found = set(connection.execute(sa.select(table.c.id).where(of_runs)).scalars())
            _delete_by_id(connection, table, sorted(found.difference(kept)))


def delete_tags(instance: dg.DagsterInstance, run_ids: Sequence[str]) -> None:
    """Delete the tags of ``run_ids``: only PostgreSQL does so by itself."""
    storage = instance.run_storage
    if not isinstance(storage, _RunStorage):
        return
    with storage.connect() as connection:
        table = _find_table(connection, "run_tags", "run_id")
        if table is not None:
            for start in range(0, len(run_ids), _AT_ONCE):
                connection.execute(table.delete().where(table.c.run_id.in_(run_ids[start : start + _AT_ONCE])))


def delete_run_files(instance: dg.DagsterInstance, run_id: str) -> None:
    """Delete the run's output and, on SQLite, its own database."""
    instance.compute_log_manager.delete_logs(prefix=[run_id])
    storage = instance.event_log_storage
    if isinstance(storage, _FileStorage):
        for ending in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                Path(storage.path_for_shard(run_id) + ending).unlink()


def compact(instance: dg.DagsterInstance) -> None:
    """Give free pages of SQLite's files back to the disk, where they are many. Others wait meanwhile, which they can for 30 s."""
    stores: list[AbstractContextManager[sa.Connection]] = []
    if isinstance(instance.event_log_storage, _IndexedStorage):
        stores.append(instance.event_log_storage.index_connection())
    if isinstance(instance.run_storage, _RunStorage):
        stores.append(instance.run_storage.connect())
    for store in stores:
        with suppress(sa.exc.OperationalError), store as connection:  # busy: the next time
            if connection.dialect.name == "sqlite" and _is_worth_it(connection):
                # Within Dagster's transaction, but SQLite's driver begins none before the first change.
                connection.exec_driver_sql("VACUUM")


def measure_home(instance: dg.DagsterInstance) -> tuple[int, int]:
    """Number and bytes of the files below the Dagster home."""
    sizes = []
    for path in Path(instance.root_directory).rglob("*"):
        with suppress(OSError):
            if path.is_file():
                sizes.append(path.stat().st_size)
    return len(sizes), sum(sizes)


def _is_worth_it(connection: sa.Connection) -> bool:
    page, free, pages = (
        int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
        for name in ("page_size", "freelist_count", "page_count")
    )
    return free * page > _WORTH_B and free > _SPARE * pages


def _find_table(connection: sa.Connection, name: str, *columns: str) -> sa.Table | None:
    try:
        table = sa.Table(name, sa.MetaData(), autoload_with=connection, resolve_fks=False)
    except sa.exc.NoSuchTableError:
        return None
    return table if all(column in table.c for column in columns) else None


def _delete_by_id(connection: sa.Connection, table: sa.Table, ids: Sequence[int]) -> None:
    for start in range(0, len(ids), _AT_ONCE):
        connection.execute(table.delete().where(table.c.id.in_(ids[start : start + _AT_ONCE])))
