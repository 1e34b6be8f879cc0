"""What the pacing ledger needs of a backend, and the tables it keeps there: `sqlite_backend.py` or `postgres_backend.py`.

Both run a function inside one transaction that no other process can overlap. What the rows mean: `ledger_rows.py`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.ib.pacing.clock import Reading
from ktrdr_pipelines.ib.pacing.rules import BURST_UNITS

T = TypeVar("T")
Row = tuple[Any, ...]

_OWNED = """
    token TEXT PRIMARY KEY, login TEXT NOT NULL,
    wall_s DOUBLE PRECISION NOT NULL, boot_s DOUBLE PRECISION NOT NULL, boot_id TEXT NOT NULL,
    host TEXT NOT NULL, pid INTEGER NOT NULL, started TEXT NOT NULL"""
_ASK = f"""
    identity TEXT NOT NULL, contract TEXT NOT NULL, weight INTEGER NOT NULL CHECK (weight > 0 AND weight < {BURST_UNITS})"""
_TABLES = (
    f"""CREATE TABLE IF NOT EXISTS ib_pacing_requests ({_OWNED}, {_ASK},
    is_sent INTEGER NOT NULL CHECK (is_sent IN (0, 1)), is_finished INTEGER NOT NULL CHECK (is_finished IN (0, 1)))""",
    f"CREATE TABLE IF NOT EXISTS ib_pacing_tickets ({_OWNED}, {_ASK}, seq INTEGER NOT NULL)",
    f"""CREATE TABLE IF NOT EXISTS ib_pacing_holds ({_OWNED},
    seconds DOUBLE PRECISION NOT NULL, is_penalty INTEGER NOT NULL CHECK (is_penalty IN (0, 1)), reason TEXT NOT NULL)""",
)
"""Requests, waiters, and pauses of all processes (``ib_pacing_holds``: the name is part of existing files), as first made."""
_STEPS = (
    _TABLES,
    tuple(
        f"ALTER TABLE ib_pacing_{table} ADD COLUMN {column}"
        for table in ("requests", "tickets")
        for column in ("work TEXT NOT NULL DEFAULT 'interactive'", "waited_s DOUBLE PRECISION NOT NULL DEFAULT 0")
    ),
)
"""What leads from each version of the schema to the next. Columns have defaults, so that a program of the previous version that
runs beside this one can go on writing. Before version 2 no version was recorded."""
SCHEMA_VERSION = len(_STEPS)
READ_VERSION = "SELECT MAX(version) FROM ib_pacing_schema"


def upgrade(run: Callable[[str], object], version: int) -> None:
    """Make the tables, or bring those of ``version`` (0: none) up to date, by calling ``run`` with each statement, inside one
    transaction of the caller.

    Raises:
        StoreError: they are of a newer version; nothing was changed.
    """
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"it has version {version}, and this program knows only versions up to {SCHEMA_VERSION}",
            doing="pacing ledger",
            advice="Another program of this login is newer: install the same version here. No request was sent.",
        )
    for step in _STEPS[version:]:
        for statement in step:
            run(statement)
    if version < SCHEMA_VERSION:
        run("CREATE TABLE IF NOT EXISTS ib_pacing_schema (version INTEGER NOT NULL)")
        run(f"INSERT INTO ib_pacing_schema VALUES ({SCHEMA_VERSION})")


INSERT_PAUSE = """INSERT INTO ib_pacing_holds
    (token, login, wall_s, boot_s, boot_id, host, pid, started, seconds, is_penalty, reason)
    VALUES (:token, :login, :wall_s, :boot_s, :boot_id, :host, :pid, :started, :seconds, :is_penalty, :reason)"""

LOCK_TIMEOUT_S = 30.0
"""How long one transaction waits for the others. They take a millisecond: only a process stopped in the middle is slower."""


class Transaction(Protocol):
    """What a function run by a backend may do. Parameters are named, ``:name``."""

    def rows(self, sql: str, **parameters: object) -> list[Row]: ...

    def run(self, sql: str, **parameters: object) -> None: ...

    def read_clock(self) -> Reading:
        """The time, read while all other processes are locked out."""


class LedgerStore(Protocol):
    """Runs ``body`` in one transaction: committed when it returns, undone when it raises, exclusive in between.

    Raises:
        StoreError: the disk or the database refuses; nothing was decided.
    """

    def run(self, body: Callable[[Transaction], T]) -> T: ...

    def interrupt(self) -> None:
        """Let `run`, in other threads, not wait any longer for another process; where that is possible."""

    def close(self) -> None: ...


def pause_parameters(
    login: str, now: Reading, seconds: float, reason: str, *, is_penalty: bool = False
) -> dict[str, object]:
    """Parameters for `INSERT_PAUSE`. A pause has no owner: it outlives the process that learned of it."""
    return {
        "token": uuid.uuid4().hex, "login": login, "wall_s": now.wall_s, "boot_s": now.boot_s, "boot_id": now.boot_id,
        "host": "", "pid": 0, "started": "", "seconds": seconds, "is_penalty": int(is_penalty), "reason": reason,
    }  # fmt: skip
