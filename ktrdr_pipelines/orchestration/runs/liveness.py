"""A sign of life of every run: a locked file in the Dagster home, which the kernel lets go with the process.

It tells what a process number cannot: whether a run of another container still goes, and one that the daemon started. Dagster
itself notices neither when the code server that started a run is gone as well; such a run would stay STARTED and keep its pool
slot for ever. Locks reach as far as the machine whose disk the home is on.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

SURE_AFTER_S = 60.0
"""A file younger than this says nothing: its process may be about to lock it, and a look would come between."""
_KEEP_S = 86400.0
_mutex = threading.Lock()
_shown: dict[str, FileLock] = {}
_ended: set[str] = set()


def show_life(home: Path, run_id: str) -> None:
    """From now on this run goes as long as this process does. Where ``home`` cannot be written, nothing is shown or reaped."""
    with _mutex:
        for ended in _ended & _shown.keys():
            lock = _shown.pop(ended)
            with suppress(OSError):
                _file(home, ended).unlink(missing_ok=True)  # while it is locked: nobody can mistake it
            lock.release()
        _ended.clear()
        if run_id in _shown:
            return
        # Not thread-local: the next run may begin in another thread.
        lock = FileLock(_file(home, run_id), timeout=0, thread_local=False)
        with suppress(OSError, Timeout):
            _file(home, run_id).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            _shown[run_id] = lock


def may_end(run_id: str) -> None:
    """This run's resources are closed. Its end is recorded a moment later, so the sign stays until the process begins another."""
    with _mutex:
        _ended.add(run_id)


def is_gone(home: Path, run_id: str) -> bool:
    """True for a run whose process showed life and has ended; False where one lives or nothing is known.

    Ask Dagster for the run's status after this, not before: a run that ends in between is not one that died.
    """
    path = _file(home, run_id)
    return run_id not in _shown and _age_s(path) > SURE_AFTER_S and _is_free(path)


def sweep(home: Path) -> None:
    """Remove files of runs that ended a day ago or longer."""
    for path in _file(home, "").parent.glob("*.lock"):
        if _age_s(path) > _KEEP_S and path.stem not in _shown and _is_free(path):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _file(home: Path, run_id: str) -> Path:
    return home / "running" / f"{run_id}.lock"


def _age_s(path: Path) -> float:
    """Seconds since the file was made; below zero where there is none."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return -1.0


def _is_free(path: Path) -> bool:
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except (Timeout, OSError):
        return False
    lock.release()
    return True
