"""The pacing ledger in SQLite: one file per gateway login, on a local disk.

sqlite3 itself serves the file: through SQLAlchemy the same statements took half as long again (twice, without the disk's
part) and its import a quarter of a second. A file that is lost or damaged is replaced by one that pauses for ten minutes: see
`SqliteStore`.
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

from filelock import FileLock, Timeout

from ktrdr_pipelines.errors import KtrdrError, StoreError
from ktrdr_pipelines.ib.pacing.backends import (
    INSERT_PAUSE,
    LOCK_TIMEOUT_S,
    READ_VERSION,
    SCHEMA_VERSION,
    Row,
    T,
    Transaction,
    pause_parameters,
    upgrade,
)
from ktrdr_pipelines.ib.pacing.clock import Clock, Reading
from ktrdr_pipelines.ib.pacing.rules import WINDOW_MARGIN_S, WINDOW_S

CAUTIOUS_PAUSE_S = WINDOW_S + WINDOW_MARGIN_S
"""Pause after a lost ledger: by then none of its requests counts any more."""


def ledger_path(directory: Path, login: str) -> Path:
    """The file of ``login`` (the account, or ``host:port``) in ``directory``: ``ib_pacing_127.0.0.1_4002.db``."""
    readable = re.sub(r"[^A-Za-z0-9.-]", "_", login)
    # Names that differ only in what was replaced must not share a budget; a long name must not exceed what a file system allows.
    is_plain = readable == login.replace(":", "_") and len(readable) <= 64
    return directory / f"ib_pacing_{readable if is_plain else readable[:48] + '-' + _digest(login)}.db"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class _Damaged(Exception):
    """The file is not, or no longer, a ledger."""


def _raise_if_damaged(error: BaseException) -> None:
    """Raise `_Damaged` where ``error`` means that the file is no ledger any more (one truncated to nothing has no tables)."""
    code = getattr(error, "sqlite_errorcode", 0)
    is_damage = (
        code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or code == sqlite3.SQLITE_IOERR_SHORT_READ
    )
    if is_damage or (isinstance(error, sqlite3.OperationalError) and "no such table" in str(error)):
        raise _Damaged(str(error)) from error


def _read_version(connection: sqlite3.Connection) -> int:
    """Version of the tables; 1 where none is recorded."""
    find = "SELECT 1 FROM sqlite_master WHERE name = 'ib_pacing_schema'"
    if connection.execute(find).fetchone() is None:
        return 1
    (version,) = connection.execute(READ_VERSION).fetchone()
    if version is None:
        raise _Damaged("it has no version")
    return int(version)


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

    One connection per object, shared by its threads under a mutex; `close` closes it, in whatever thread.

    A killed process frees its transaction at once: the kernel drops its locks, SQLite undoes the rest. Commits reach the
    disk before a request is sent, so a power cut forgets none.

    When the file existed and is gone, or is not a database any more, it is unknown how much of the budget is used: what is left
    of it is moved aside as ``*.corrupt-<stamp>``, and the new ledger pauses all requests for ten minutes. The ``.lock`` file
    beside it shows that the file existed; it stays. Removing both is a fresh start.
    """

    def __init__(self, path: Path, login: str, clock: Clock) -> None:
        self.path = path
        self._login = login
        self._clock = clock
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._pid = os.getpid()
        self._mutex = threading.Lock()
        self._interruptions = 0
        self._abandoned: list[sqlite3.Connection] = []

    def run(self, body: Callable[[Transaction], T]) -> T:
        if self._pid != os.getpid():
            # After a fork the connection is the parent's: using or closing it here could drop the parent's locks.
            if self._connection is not None:
                self._abandoned.append(self._connection)
            self._pid, self._mutex, self._connection = os.getpid(), threading.Lock(), None
        interruptions = self._interruptions
        with self._mutex:
            for _ in range(8):
                try:
                    connection = self._begin(lambda: self._interruptions != interruptions)
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

    def interrupt(self) -> None:
        self._interruptions += 1

    def close(self) -> None:
        self.interrupt()
        with self._mutex:
            if self._pid == os.getpid():
                self._disconnect()

    def _begin(self, is_interrupted: Callable[[], bool]) -> sqlite3.Connection | None:
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
                if not is_busy or time.monotonic() > deadline_s or is_interrupted():
                    raise
            # Not SQLite's own waiting: it backs off to a tenth of a second, so that the longest waiter tries least often.
            time.sleep(random.uniform(0.0005, 0.002))
        # Only now, inside the lock, is it certain that this is the file that all other processes have open.
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
            self._disconnect()  # closing undoes the rest; the first error is the one to raise

    def _open(self) -> sqlite3.Connection:
        """Connect to the ledger, created anew if it is missing or damaged. One process at a time."""
        marker = self.path.with_name(self.path.name + ".lock")
        existed = marker.exists() or self._inode is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(marker, timeout=LOCK_TIMEOUT_S):
                return self._open_alone(existed)
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

    def _open_alone(self, existed: bool) -> sqlite3.Connection:
        if self.path.exists():
            try:
                return self._connect()
            except _Damaged:
                self._move_aside("corrupt")
                return self._create("the pacing ledger was damaged: the budget may be used up")
        # What is left of the old one's log and index may be in use by processes that have the deleted file open.
        self._move_aside("orphaned")
        return self._create("the pacing ledger was deleted: the budget may be used up" if existed else None)

    def _connect(self) -> sqlite3.Connection:
        """Open the existing file and look at all of it."""
        if self.path.stat().st_size == 0:
            # SQLite takes it for a new database, and would wait for the processes that still use the old one.
            raise _Damaged("the file is empty")
        connection = self._open_file()
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            for table in ("requests", "tickets", "holds"):
                connection.execute(f"SELECT 1 FROM ib_pacing_{table} LIMIT 1")
            if verdict != "ok":
                raise _Damaged(verdict)
            if _read_version(connection) != SCHEMA_VERSION:
                self._upgrade(connection)
        except (sqlite3.Error, _Damaged, StoreError) as error:
            connection.close()
            _raise_if_damaged(error)
            raise
        connection.execute("PRAGMA busy_timeout = 0")  # from here on `_begin` waits
        self._connection, self._inode = connection, self._identify()
        return connection

    def _upgrade(self, connection: sqlite3.Connection) -> None:
        """Bring an older file up to date, in one transaction, while other processes may be using it."""
        connection.execute("BEGIN IMMEDIATE")
        try:
            upgrade(connection.execute, _read_version(connection))
            connection.execute("COMMIT")
        except BaseException:
            self._roll_back(connection)
            raise

    def _open_file(self) -> sqlite3.Connection:
        # Transactions are begun and ended by explicit statements; the mutex keeps threads apart.
        return sqlite3.connect(self.path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)

    def _create(self, pause_reason: str | None) -> sqlite3.Connection:
        connection = self._open_file()
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            upgrade(connection.execute, 0)
            if pause_reason is not None:
                pause = pause_parameters(self._login, self._clock.read(), CAUTIOUS_PAUSE_S, pause_reason)
                connection.execute(INSERT_PAUSE, pause)
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
