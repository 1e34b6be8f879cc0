"""The pacing ledger in PostgreSQL, by SQLAlchemy URL: for runs that are spread over machines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from ktrdr_pipelines.errors import InputError, StoreError
from ktrdr_pipelines.ib.pacing.backends import LOCK_TIMEOUT_S, READ_VERSION, Row, T, Transaction, upgrade
from ktrdr_pipelines.ib.pacing.clock import Clock, Reading

if TYPE_CHECKING:
    from sqlalchemy import Connection


class DatabaseAway(StoreError):
    """The database is away, restarts, or does not answer: a later try may succeed."""

    is_transient = True


class _PostgresTransaction:
    def __init__(self, connection: Connection, clock: Clock | None) -> None:
        self._connection = connection
        self._clock = clock

    def rows(self, sql: str, **parameters: object) -> list[Row]:
        from sqlalchemy import text

        return [tuple(row) for row in self._connection.execute(text(sql), parameters)]

    def run(self, sql: str, **parameters: object) -> None:
        from sqlalchemy import text

        self._connection.execute(text(sql), parameters)

    def read_clock(self) -> Reading:
        if self._clock is not None:
            return self._clock.read()
        return Reading(float(self.rows("SELECT extract(epoch FROM clock_timestamp())")[0][0]), 0.0, "")


def _read_version(connection: Connection) -> int:
    """Version of the tables: 0 without tables, 1 where none is recorded."""
    from sqlalchemy import text

    find = text("SELECT to_regclass('ib_pacing_requests') IS NOT NULL, to_regclass('ib_pacing_schema') IS NOT NULL")
    has_tables, has_version = connection.execute(find).one()
    return int(connection.execute(text(READ_VERSION)).scalar_one()) if has_version else int(has_tables)


class PostgresStore:
    """A database shared by several machines, by SQLAlchemy URL; its driver has to be installed (psycopg, pg8000, ...).

    An advisory lock per login takes the place of SQLite's file lock. Only the server's clock counts, since those of the machines
    differ; ``clock`` is for tests. A client that dies frees its lock with its connection; the server disconnects one that is
    stopped in the middle after ten seconds.
    """

    def __init__(self, url: str, login: str, clock: Clock | None = None) -> None:
        from sqlalchemy import create_engine
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError

        doing = "pacing ledger by URL"
        try:
            self._engine = create_engine(url, pool_pre_ping=True, pool_size=2)
        except ModuleNotFoundError as error:
            raise InputError(
                f"no driver for this database: {error.name} is not installed",
                doing=doing,
                advice="Install psycopg, and write the URL as postgresql+psycopg://user@host/database.",
            ) from error
        except (ArgumentError, NoSuchModuleError) as error:
            raise InputError(
                str(error), doing=doing, advice="Write it as postgresql+psycopg://user@host/database."
            ) from error
        if self._engine.dialect.name != "postgresql":
            raise InputError(
                f"{self._engine.dialect.name} is not supported", doing=doing, advice="Use PostgreSQL or a path."
            )
        self._key = int.from_bytes(hashlib.sha256(login.encode()).digest()[:8], "big", signed=True)
        self._clock = clock
        self._has_tables = False

    def run(self, body: Callable[[Transaction], T]) -> T:
        from sqlalchemy import text
        from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

        try:
            with self._engine.begin() as connection:
                connection.execute(text(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_S * 1000:.0f}"))
                connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 10000"))
                if not self._has_tables:
                    # Two processes that create a table at once would fail: one key for all logins.
                    connection.execute(text("SELECT pg_advisory_xact_lock(7245180)"))
                    upgrade(lambda statement: connection.execute(text(statement)), _read_version(connection))
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": self._key})
                result = body(_PostgresTransaction(connection, self._clock))
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            kind = DatabaseAway if isinstance(error, OperationalError | InterfaceError) else StoreError
            raise kind(
                f"the pacing ledger in PostgreSQL cannot be used: {cause}",
                advice="Check the database; no request was sent.",
            ) from error
        self._has_tables = True
        return result

    def interrupt(self) -> None:
        """A call of the driver cannot be ended from outside."""

    def close(self) -> None:
        self._engine.dispose()
