"""Where the pacing ledger's rows are kept: one SQLite file per gateway login, or a PostgreSQL database by URL.

Both run a function inside one transaction that no other process can overlap. What the rows mean is in `ledger_rows.py`.
sqlite3 itself serves the file: through SQLAlchemy the same statements took half as long again (twice, without the disk's
part) and its import a quarter of a second. SQLAlchemy serves PostgreSQL.
A file that is lost or damaged is replaced by one that pauses for ten minutes: see `SqliteStore`.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from filelock import FileLock, Timeout

from ktrdr_pipelines.errors import InputError, KtrdrError, StoreError
from ktrdr_pipelines.ib.pacing.clock import Clock, Reading
from ktrdr_pipelines.ib.pacing.rules import BURST_UNITS, MARGIN_S, WINDOW_S

if TYPE_CHECKING:
    from sqlalchemy import Connection

T = TypeVar("T")
Row = tuple[Any, ...]

_OWNED = """
    token TEXT PRIMARY KEY, login TEXT NOT NULL,
    wall_s DOUBLE PRECISION NOT NULL, boot_s DOUBLE PRECISION NOT NULL, boot_id TEXT NOT NULL,
    host TEXT NOT NULL, pid INTEGER NOT NULL, started TEXT NOT NULL"""
_ASK = f"""
    identity TEXT NOT NULL, contract TEXT NOT NULL, weight INTEGER NOT NULL CHECK (weight > 0 AND weight < {BURST_UNITS})"""
TABLES = (
    f"""CREATE TABLE IF NOT EXISTS ib_pacing_requests ({_OWNED}, {_ASK},
    is_sent INTEGER NOT NULL CHECK (is_sent IN (0, 1)), is_finished INTEGER NOT NULL CHECK (is_finished IN (0, 1)))""",
    f"CREATE TABLE IF NOT EXISTS ib_pacing_tickets ({_OWNED}, {_ASK}, seq INTEGER NOT NULL)",
    f"""CREATE TABLE IF NOT EXISTS ib_pacing_holds ({_OWNED},
    seconds DOUBLE PRECISION NOT NULL, is_penalty INTEGER NOT NULL CHECK (is_penalty IN (0, 1)), reason TEXT NOT NULL)""",
)
INSERT_HOLD = """INSERT INTO ib_pacing_holds
    (token, login, wall_s, boot_s, boot_id, host, pid, started, seconds, is_penalty, reason)
    VALUES (:token, :login, :wall_s, :boot_s, :boot_id, :host, :pid, :started, :seconds, :is_penalty, :reason)"""

LOCK_TIMEOUT_S = 30.0
"""How long one transaction waits for the others. They take a millisecond: only a process stopped in the middle is slower."""

CAUTIOUS_HOLD_S = WINDOW_S + MARGIN_S


class Transaction(Protocol):
    """What a function run by a store may do. Parameters are named, ``:name``."""

    def rows(self, sql: str, **parameters: object) -> list[Row]: ...

    def run(self, sql: str, **parameters: object) -> None: ...

    def read_clock(self) -> Reading:
        """The time, read while everybody else is locked out."""


class LedgerStore(Protocol):
    """Runs ``body`` in one transaction: committed when it returns, undone when it raises, exclusive in between.

    Raises:
        StoreError: the disk or the database refuses; nothing was decided.
    """

    def run(self, body: Callable[[Transaction], T]) -> T: ...

    def close(self) -> None: ...


def hold_parameters(
    login: str, now: Reading, seconds: float, reason: str, *, is_penalty: bool = False
) -> dict[str, object]:
    """Parameters for `INSERT_HOLD`. A hold belongs to nobody: it outlives the process that learned of it."""
    return {
        "token": uuid.uuid4().hex, "login": login, "wall_s": now.wall_s, "boot_s": now.boot_s, "boot_id": now.boot_id,
        "host": "", "pid": 0, "started": "", "seconds": seconds, "is_penalty": int(is_penalty), "reason": reason,
    }  # fmt: skip


# -- SQLite -----------------------------------------------------------------------------------------------------------------


def ledger_path(directory: Path, login: str) -> Path:
    """The file of ``login`` (the account, or ``host:port``) in ``directory``: ``ib_pacing_127.0.0.1_4002.db``."""
    readable = re.sub(r"[^A-Za-z0-9.-]", "_", login)
    # Names that differ only in what was replaced must not share a budget by accident, nor a ledger be hidden by a long name.
    is_plain = readable == login.replace(":", "_") and len(readable) <= 64
    return directory / f"ib_pacing_{readable if is_plain else readable[:48] + '-' + _digest(login)}.db"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class _Damaged(Exception):
    """The file is not, or no longer, the ledger."""


def _raise_if_damaged(error: BaseException) -> None:
    """Raise `_Damaged` where ``error`` says that the file is no ledger any more (one truncated to nothing has no tables)."""
    code = getattr(error, "sqlite_errorcode", 0)
    is_damage = (
        code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or code == sqlite3.SQLITE_IOERR_SHORT_READ
    )
    if is_damage or (isinstance(error, sqlite3.OperationalError) and "no such table" in str(error)):
        raise _Damaged(str(error)) from error


_WHAT = {
    sqlite3.SQLITE_FULL: ("the disk is full", "Free some space; no request was sent."),
    sqlite3.SQLITE_IOERR: (
        "the disk reports an error",
        "Check space, quota and health of the disk; no request was sent.",
    ),
    sqlite3.SQLITE_READONLY: ("the file or its directory is read-only", "Make it writable; no request was sent."),
    sqlite3.SQLITE_CANTOPEN: ("the file cannot be opened", "Check that its directory exists and is writable."),
    sqlite3.SQLITE_PERM: ("access is denied", "Make the file and its directory writable."),
    sqlite3.SQLITE_BUSY: (
        f"another process kept it locked for {LOCK_TIMEOUT_S:.0f} s",
        "Look for a stopped (not ended) process of this program.",
    ),
}


class _SqliteTransaction:
    def __init__(self, connection: sqlite3.Connection, clock: Clock) -> None:
        self._connection = connection
        self._clock = clock

    def rows(self, sql: str, **parameters: object) -> list[Row]:
        return self._connection.execute(sql, parameters).fetchall()

    def run(self, sql: str, **parameters: object) -> None:
        self._connection.execute(sql, parameters)

    def read_clock(self) -> Reading:
        return self._clock.read()


class SqliteStore:
    """One file on a local disk (WAL does not work over a network), shared by threads, processes and containers of one kernel.

    A killed process frees its transaction at once: the kernel drops its locks, SQLite undoes the rest. Commits reach the
    disk before a request is sent, so a power cut forgets none.

    When the file was there and is gone, or is not a database any more, nobody knows how much of the budget is used: the
    rest is moved aside as ``*.corrupt-<stamp>`` and the new ledger holds every request for ten minutes. That the file was
    there is told by the ``.lock`` file beside it, which stays; removing both is a fresh start.
    """

    def __init__(self, path: Path, login: str, clock: Clock) -> None:
        self.path = path
        self._login = login
        self._clock = clock
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._pid = os.getpid()
        self._mutex = threading.Lock()
        self._abandoned: list[sqlite3.Connection] = []

    def run(self, body: Callable[[Transaction], T]) -> T:
        if self._pid != os.getpid():
            # After a fork the connection belongs to the parent: using or closing it here could drop the parent's locks.
            if self._connection is not None:
                self._abandoned.append(self._connection)
            self._pid, self._mutex, self._connection = os.getpid(), threading.Lock(), None
        with self._mutex:
            for _ in range(8):
                try:
                    connection = self._begin()
                    if connection is None:
                        continue
                    return self._finish(connection, body)
                except _Damaged:
                    self._disconnect()
                except sqlite3.Error as error:
                    self._disconnect()
                    raise self._explain(error) from error
        raise StoreError(
            "the pacing ledger was replaced again and again while it was in use",
            doing=f"pacing ledger {self.path}",
            advice="Find out what keeps deleting or overwriting the file.",
        )

    def close(self) -> None:
        with self._mutex:
            if self._pid == os.getpid():
                self._disconnect()

    def _begin(self) -> sqlite3.Connection | None:
        """A connection inside a transaction on the file that bears the ledger's name now; None to try again."""
        connection = self._connection or self._open()
        deadline_s = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
                break
            except sqlite3.Error as error:
                _raise_if_damaged(error)
                is_busy = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
                if not is_busy or time.monotonic() > deadline_s:
                    raise
            # Not SQLite's own waiting: it backs off to a tenth of a second, and whoever has waited long meets the lock least.
            time.sleep(random.uniform(0.0005, 0.002))
        # Only now, with the lock held, is it certain that what we hold is the file that everybody else holds.
        if self._identify() == self._inode:
            return connection
        self._disconnect()
        return None

    def _finish(self, connection: sqlite3.Connection, body: Callable[[Transaction], T]) -> T:
        try:
            result = body(_SqliteTransaction(connection, self._clock))
            connection.execute("COMMIT")
        except BaseException as error:
            self._roll_back(connection)
            _raise_if_damaged(error)
            raise
        return result

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._disconnect()  # closing undoes the rest; the error that brought us here is the one to tell

    def _open(self) -> sqlite3.Connection:
        """Connect to the ledger, made anew if it is missing or damaged. One process at a time."""
        marker = self.path.with_name(self.path.name + ".lock")
        was_there = marker.exists() or self._inode is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(marker, timeout=LOCK_TIMEOUT_S):
                return self._open_alone(was_there)
        except Timeout as error:
            raise StoreError(
                f"another process kept {marker.name} locked for {LOCK_TIMEOUT_S:.0f} s",
                doing=f"pacing ledger {self.path}",
                advice="Look for a stopped (not ended) process of this program.",
            ) from error
        except OSError as error:
            raise StoreError(
                error.strerror or str(error),
                doing=f"pacing ledger {self.path}",
                advice="Make its directory writable; no request was sent.",
            ) from error

    def _open_alone(self, was_there: bool) -> sqlite3.Connection:
        if self.path.exists():
            try:
                return self._connect()
            except _Damaged:
                self._move_aside("corrupt")
                return self._create("the pacing ledger was damaged: the budget may be used up")
        # What is left of the old one's log and index may be in use by those who have the deleted file open: not for the new one.
        self._move_aside("orphaned")
        return self._create("the pacing ledger was deleted: the budget may be used up" if was_there else None)

    def _connect(self) -> sqlite3.Connection:
        """Open the existing file and look at all of it."""
        if self.path.stat().st_size == 0:
            # SQLite takes it for a new database, and would wait for those who still use the old one.
            raise _Damaged("the file is empty")
        connection = self._dial()
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            for table in ("requests", "tickets", "holds"):
                connection.execute(f"SELECT 1 FROM ib_pacing_{table} LIMIT 1")
            if verdict != "ok":
                raise _Damaged(verdict)
        except (sqlite3.Error, _Damaged) as error:
            connection.close()
            _raise_if_damaged(error)
            raise
        connection.execute("PRAGMA busy_timeout = 0")  # from here on `_begin` waits
        self._connection, self._inode = connection, self._identify()
        return connection

    def _dial(self) -> sqlite3.Connection:
        # Transactions are begun and ended here, by name, and threads take turns by the mutex.
        return sqlite3.connect(self.path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)

    def _create(self, hold_reason: str | None) -> sqlite3.Connection:
        connection = self._dial()
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            for table in TABLES:
                connection.execute(table)
            if hold_reason is not None:
                hold = hold_parameters(self._login, self._clock.read(), CAUTIOUS_HOLD_S, hold_reason)
                connection.execute(INSERT_HOLD, hold)
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            for suffix in ("", "-wal", "-shm"):  # on a full disk each attempt would leave an empty one
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            raise
        connection.close()
        return self._connect()

    def _move_aside(self, why: str) -> None:
        stamp = datetime.fromtimestamp(self._clock.now_s(), UTC).strftime("%Y%m%dT%H%M%SZ")
        base = self.path.with_name(f"{self.path.name}.{why}-{stamp}-{uuid.uuid4().hex[:4]}")
        for suffix in ("", "-wal", "-shm"):
            part = self.path.with_name(self.path.name + suffix)
            if part.exists():
                part.rename(base.with_name(base.name + suffix))

    def _identify(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _explain(self, error: sqlite3.Error) -> KtrdrError:
        primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
        observed, advice = _WHAT.get(primary, (str(error), "No request was sent."))
        return StoreError(observed, doing=f"pacing ledger {self.path}", advice=advice)


# -- PostgreSQL -------------------------------------------------------------------------------------------------------------


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


class PostgresStore:
    """A database shared by several machines, by SQLAlchemy URL; its driver has to be installed (psycopg, pg8000, ...).

    An advisory lock per login takes the place of SQLite's file lock. The server's clock is the only one that counts, since
    those of the machines differ; ``clock`` is for tests. A client that dies frees its lock with its connection; one that is
    stopped in the middle is thrown out by the server after ten seconds.
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
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with self._engine.begin() as connection:
                connection.execute(text(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_S * 1000:.0f}"))
                connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 10000"))
                if not self._has_tables:
                    # Two processes that create a table at once would fail: one key for all logins.
                    connection.execute(text("SELECT pg_advisory_xact_lock(7245180)"))
                    for table in TABLES:
                        connection.execute(text(table))
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": self._key})
                result = body(_PostgresTransaction(connection, self._clock))
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise StoreError(
                cause, doing="pacing ledger in PostgreSQL", advice="Check the database; no request was sent."
            ) from error
        self._has_tables = True
        return result

    def close(self) -> None:
        self._engine.dispose()
