"""Two locks of a series: the series lock, one load at a time, and the write lock, one write at a time.

Two loads side by side would lose nothing (each write takes the write lock), but would request the same bars twice. Readers and
`ktrdr adopt` need no series lock.

Both are files beside the CSV, not the CSV itself: a rename would leave the lock on the old file. filelock keeps its time-outs
and is free at once after kill -9 (docs/dependencies.md).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ktrdr_pipelines.domain.calls import QUIET_S, OnWait, Waiting, show_nothing
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.store.atomic import explained

_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_HOLDER = re.compile(r"process \d+, since [0-9: -]+ UTC")


class SeriesLock:
    """The right to be the one load of ``series``. The end of its process frees it, however it ends.

    In a folder that cannot be written there is no lock: a load there can do no more than find that no bar is missing.
    """

    def __init__(self, data_dir: Path, series: Series) -> None:
        self._series = series
        self._path = data_dir / f".{series.name}.load.lock"
        # It may be released in another thread than it was acquired in: a generator ends where it is collected.
        self._lock = FileLock(self._path, timeout=0, thread_local=False)

    def try_acquire(self) -> str:
        """Acquire it, without waiting; empty, or what has it, such as ``another load of AAPL 1h (process 4711, since
        2024-01-02 14:02 UTC)``.

        Raises:
            StoreError: the disk refuses for another reason than that the folder cannot be written.
        """
        with explained(self._path, f"preparing the files of {self._series}"):
            try:
                _make_lock_file(self._path)
            except OSError as refusal:
                if refusal.errno not in _UNWRITABLE:
                    raise
                return ""
        try:
            self._lock.acquire()
        except Timeout:
            return f"another load of {self._series} ({_read_holder(self._path)})"
        _write_holder(self._path)
        return ""

    def release(self) -> None:
        """Free it; harmless when it was not acquired."""
        self._lock.release()


def acquire_showing(lock: FileLock, timeout_s: float, reason: str, on_wait: OnWait) -> None:
    """Acquire ``lock``; ``on_wait`` is called when that takes longer than a moment.

    Raises:
        filelock.Timeout: another process keeps it for longer than ``timeout_s``.
    """
    try:
        lock.acquire(timeout=min(QUIET_S, timeout_s))
    except Timeout:
        left_s = timeout_s - QUIET_S
        if left_s <= 0:
            raise
        on_wait(Waiting.for_seconds(reason, left_s))
        lock.acquire(timeout=left_s)


@contextmanager
def write_lock(
    data_dir: Path, series: Series, timeout_s: float, doing: str, *, on_wait: OnWait = show_nothing
) -> Iterator[None]:
    """The block may write the files of ``series``; ``data_dir`` is made when it is not there.

    Raises:
        StoreError: another process keeps the lock for longer than ``timeout_s``, or the disk refuses.
    """
    path = data_dir / f".{series.name}.lock"
    lock = FileLock(path)
    with explained(path, doing):
        _make_lock_file(path)
        try:
            acquire_showing(lock, timeout_s, f"another process that writes {series.name}.csv", on_wait)
        except Timeout:
            raise StoreError(
                f"another process has been writing {series.name}.csv for {timeout_s:g} s",
                doing=doing,
                advice=f"Wait for it, or find it with `fuser {path}`; the lock is free as soon as it ends.",
            ) from None
    try:
        yield
    finally:
        lock.release()


def _make_lock_file(path: Path) -> None:
    """filelock takes a file that cannot be made for one that is contended, and would wait for its whole time-out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))


def _write_holder(path: Path) -> None:
    """Name this process in its lock file: a help for users who wait. The content never decides who has the lock."""
    with suppress(OSError):
        path.write_text(f"process {os.getpid()}, since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n", encoding="ascii")


def _read_holder(path: Path) -> str:
    """The process that has the lock and since when; where that is unknown, how to find it."""
    with suppress(OSError, ValueError):
        if found := _HOLDER.match(path.read_text(encoding="ascii")):
            return found[0]
    return f"`fuser {path}` shows its process"
