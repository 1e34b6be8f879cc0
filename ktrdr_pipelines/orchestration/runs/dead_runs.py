"""Runs whose process was killed: they are marked as failed and their pool slots freed, as soon as anybody looks.

Dagster notices the death of workers that its daemon launched, and of no others: a killed `ktrdr ib-load` or `dagster asset
materialize` would stay STARTED and keep its pool slot for ever (docs/dagster_facts.md, 5). So each run carries a tag that says
which process executes it, and shows a sign of life that other containers see too (`liveness.py`). Who looks: every process that
executes a run, at its start and while it runs (it may be waiting for the very slot), the sensors, and `ktrdr ui`.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
from sqlalchemy.exc import SQLAlchemyError

from ktrdr_pipelines.ib.processes import Owner, current_owner
from ktrdr_pipelines.orchestration.runs.liveness import is_gone, sweep

logger = logging.getLogger(__name__)

OWNER_TAG = "ktrdr/owner"

NEVER_BEGAN_S = 600.0
"""A run without an owner that never began, and of which nothing was recorded for so long, lost its process while it was made."""

_LOOK_EVERY_S = 5.0

_Status = dg.DagsterRunStatus
_UNFINISHED = [_Status.NOT_STARTED, _Status.STARTING, _Status.STARTED, _Status.CANCELING]
_BEFORE_EXECUTION = {
    dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
    dg.DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED,
    dg.DagsterEventType.RUN_START,
}


def owner_tag(run_id: str) -> dict[str, str]:
    """The tag that lets `reap_dead_runs` tell whether the process that executes the run still lives: this one.

    The run's id is in it because Dagster copies tags to re-executions, where they are somebody else's.
    """
    owner = current_owner()
    return {OWNER_TAG: json.dumps([run_id, _machine(), owner.host, owner.pid, owner.started])}


def reap_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs whose process is gone as failed, free the pool slots of all that have ended; the ids of those marked."""
    reaped, home = [], Path(instance.root_directory)
    for run in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED)):
        if not _is_dead(instance, run) and not is_gone(home, run.run_id):
            continue
        now = instance.get_run_by_id(run.run_id)  # another process may have been faster
        if now is None or now.is_finished:
            continue
        if now.status is _Status.CANCELING:
            instance.report_run_canceled(now, "The process that executed this run is gone.")
        else:
            instance.report_run_failed(now, "The process that executed this run is gone.")
        reaped.append(run.run_id)
    _free_slots_of_ended_runs(instance)
    sweep(home)
    return reaped


@contextmanager
def reaping(instance: dg.DagsterInstance) -> Iterator[None]:
    """Reap at once and then every few seconds inside the block: a run that waits for a pool slot may be waiting for one that
    a dead process holds, and nobody else may be there to look."""
    reap_dead_runs(instance)
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(_LOOK_EVERY_S):
            try:
                reap_dead_runs(instance)
            except (dg.DagsterError, SQLAlchemyError) as failure:  # a busy database; the next look will do
                logger.debug("looking for runs of dead processes: %s", failure)

    thread = threading.Thread(target=look, name="ktrdr-reaping", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _is_dead(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    owner = _owner_of(run)
    if owner is None:
        return _never_began(instance, run)
    machine, process = owner
    alive = process.is_alive()
    if alive is None:
        # A process of this machine, but not of this boot of it: no process survives that.
        return bool(machine) and machine == _machine() and _boot(process) != _boot(current_owner())
    return not alive


def _owner_of(run: dg.DagsterRun) -> tuple[str, Owner] | None:
    """Machine and process that execute ``run``; None where its tags do not tell."""
    try:
        run_id, machine, host, pid, started = json.loads(run.tags.get(OWNER_TAG, "[]"))
    except (ValueError, TypeError):
        return None
    return (str(machine), Owner(str(host), int(pid), str(started))) if run_id == run.run_id else None


def _never_began(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """True if nothing happened in ``run`` after it was made, for long. Which process made it is not recorded."""
    entries = instance.event_log_storage.get_logs_for_run(run.run_id, limit=1, ascending=False)
    if entries:
        event = entries[0].dagster_event
        is_made_only = event is not None and event.event_type in _BEFORE_EXECUTION
        return is_made_only and time.time() - entries[0].timestamp > NEVER_BEGAN_S
    record = instance.get_run_record_by_id(run.run_id)
    return record is not None and time.time() - record.create_timestamp.timestamp() > NEVER_BEGAN_S


def _free_slots_of_ended_runs(instance: dg.DagsterInstance) -> None:
    """Slots that a process did not give back: it was killed, or it died right after its run had ended."""
    storage = instance.event_log_storage
    holders = set(storage.get_concurrency_run_ids()) if storage.supports_global_concurrency_limits else set()
    if not holders:
        return
    going = {run.run_id for run in instance.get_runs(dg.RunsFilter(run_ids=list(holders))) if not run.is_finished}
    for run_id in holders - going:
        storage.free_concurrency_slots_for_run(run_id)


def _machine() -> str:
    """What stays the same on this machine when it is started anew; empty where the system does not say."""
    try:
        known = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return f"{known}/{socket.gethostname()}" if known else ""


def _boot(owner: Owner) -> str:
    return owner.host.partition("/")[0]
