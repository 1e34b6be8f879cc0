"""Liveness of runs: a run is alive while a process keeps the run's file in the Dagster home locked.

One mechanism for every run, from any entry point. The kernel releases the lock when the process ends, however it ends, and
shows that to all processes and containers of the machine that has the folder; a run of another machine has no file here and is
left alone. Dagster's run monitoring cannot replace this: it needs a running daemon, and it asks the run launcher, which knows
only the workers of its own code server. A killed `ktrdr ib-load` or `dagster asset materialize` stays STARTED
(docs/dagster_facts.md, 5).

Runs of dead processes are ended by every process that executes a run, at its start and end, by the sensors, `ktrdr ui`,
`ktrdr ib cleanup`, and by queries about a run.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import dagster as dg
from filelock import FileLock, Timeout

from ktrdr_pipelines.domain.instruments import ASSET_ROOT

logger = logging.getLogger(__name__)

QUIET_S = 600.0
"""A run that no process began to execute, and of which nothing was recorded for so long, lost its process at its launch."""

_LOCK_TIMEOUT_S = 5.0
_CREATED_WITHIN_S = 3600.0

_Status = dg.DagsterRunStatus
_UNFINISHED = [_Status.NOT_STARTED, _Status.STARTING, _Status.STARTED, _Status.CANCELING]

_mutex = threading.Lock()
_locks: dict[str, FileLock] = {}
"""By run id the locks of this process."""


@contextmanager
def executing(instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """Inside the block this process executes the run. The block must include the end of the run."""
    _lock(instance, run_id)
    try:
        yield
    finally:
        with _mutex:
            _release(run_id)


def executing_here(instance: dg.DagsterInstance, run_id: str) -> None:
    """For a run's resources: this process executes the run; runs of dead processes are ended.

    Resources are closed before Dagster records the end of the run, so the lock outlives them: until the process ends, or begins
    its next run.
    """
    _lock(instance, run_id)
    reap_dead_runs(instance)


def reap_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """End the runs whose process is dead. Returns their ids."""
    reaped = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=_UNFINISHED)):
        reason = _why_dead(instance, record)
        # Read again, and after the look at the lock: the run may have ended, or another process may have been faster.
        run = instance.get_run_by_id(record.dagster_run.run_id) if reason else None
        if run is None or run.is_finished:
            continue
        if run.status is _Status.CANCELING:
            instance.report_run_canceled(run, reason)
        else:
            instance.report_run_failed(run, reason)
        reaped.append(run.run_id)
    _remove_files_of_ended_runs(instance)
    return reaped


def _why_dead(instance: dg.DagsterInstance, record: dg.RunRecord) -> str:
    """Why the run of ``record`` cannot be going on; empty where it can."""
    run_id = record.dagster_run.run_id
    path = _file(instance, run_id)
    if run_id in _locks:
        return ""
    with suppress(OSError):
        if process := path.read_text(encoding="utf-8"):
            return f"The process that executed this run is gone ({process})." if _is_free(path) else ""
    if _never_began(instance, record):
        return "The process that launched this run is gone: no process began to execute it."
    return ""


def _never_began(instance: dg.DagsterInstance, record: dg.RunRecord) -> bool:
    """True if nothing was recorded for `QUIET_S`, and no process can have begun to execute the run.

    A started run of other assets or jobs may well be at work: only ours record that their resources are ready, after the lock.
    """
    run, now = record.dagster_run, time.time()
    if now - record.create_timestamp.timestamp() <= QUIET_S:
        return False
    if run.status in (_Status.STARTED, _Status.CANCELING):
        is_ours = any(key.path[0] == ASSET_ROOT for key in run.asset_selection or ())
        if not is_ours or instance.all_logs(run.run_id, of_type=dg.DagsterEventType.RESOURCE_INIT_SUCCESS):
            return False
    newest = instance.get_records_for_run(run.run_id, limit=1, ascending=False).records
    return not newest or now - newest[0].event_log_entry.timestamp > QUIET_S


def _remove_files_of_ended_runs(instance: dg.DagsterInstance) -> None:
    """Also those of runs that were never created, after an hour."""
    for path in _file(instance, "").parent.glob("*.lock"):
        if _is_free(path):
            run = instance.get_run_by_id(path.stem)
            with suppress(OSError):
                if run.is_finished if run else time.time() - path.stat().st_mtime > _CREATED_WITHIN_S:
                    path.unlink()


def _lock(instance: dg.DagsterInstance, run_id: str) -> None:
    """Lock the run's file, then name the process in it: an empty file means nothing, its process may be about to lock it.

    Where the home cannot be written the run has no file, and is never judged dead.
    """
    with _mutex:
        for other in _locks.keys() - {run_id}:
            ended = instance.get_run_by_id(other)
            if ended is not None and ended.is_finished:
                _release(other)
        if run_id in _locks:
            return
        path = _file(instance, run_id)
        # Not thread-local: the next run may begin in another thread.
        lock = FileLock(path, timeout=_LOCK_TIMEOUT_S, thread_local=False)
        with suppress(OSError, Timeout):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            _locks[run_id] = lock
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")


def _release(run_id: str) -> None:
    """The file stays: with it free, a run whose end could not be recorded is known to be dead."""
    if lock := _locks.pop(run_id, None):
        lock.release()


def _file(instance: dg.DagsterInstance, run_id: str) -> Path:
    return Path(instance.root_directory) / "running" / f"{run_id}.lock"


def _is_free(path: Path) -> bool:
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except (Timeout, OSError):
        return False
    lock.release()
    return True
