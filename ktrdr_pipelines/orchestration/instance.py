"""Dagster's instance for doors of our own: found without environment variables, initialised once, rid of dead runs.

A fresh home must be initialised by one process alone: four at once leave two alembic heads in it, for ever
(dagster_facts.md, 1). Runs whose process was killed stay STARTED and keep their pool slot; nobody else would ever notice
(dagster_facts.md, 5). Which ones is told by the process number on this machine, and by `life.py` across containers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import dagster as dg
from filelock import FileLock, Timeout

from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.ib.owners import Owner, current_owner
from ktrdr_pipelines.orchestration.life import is_gone, sweep
from ktrdr_pipelines.settings import PROJECT_ROOT, Settings

ORIGIN_TAG = "ktrdr/origin"
OWNER_TAG = "ktrdr/owner"


def owner_tags(origin: str) -> dict[str, str]:
    """Tags that let `reap_dead_runs` tell whether the process that executes a run still lives."""
    owner = current_owner()
    return {ORIGIN_TAG: origin, OWNER_TAG: json.dumps([owner.host, owner.pid, owner.started])}


def open_instance(settings: Settings) -> dg.DagsterInstance:
    """The instance in the settings' Dagster home; a fresh home gets the project's `dagster.yaml`.

    Raises:
        StoreError: the folder cannot be written.
    """
    home = settings.dagster_home
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / ".initialising.lock", timeout=120):
            _provide_config(home)
            instance = dg.DagsterInstance.from_config(str(home))
            instance.get_runs(limit=1)
    except Timeout:
        raise StoreError(f"{home} is being initialised by another process", advice="Try again in a moment.") from None
    except OSError as error:
        raise StoreError(
            f"DAGSTER_HOME {home} cannot be written: {error.strerror or error}",
            advice="Make it writable, or set DAGSTER_HOME to another folder.",
        ) from None
    return instance


def _provide_config(home: Path) -> None:
    target, ours = home / "dagster.yaml", PROJECT_ROOT / "dagster_home" / "dagster.yaml"
    if not target.exists():
        if ours.exists():
            shutil.copyfile(ours, target)
        else:
            target.touch()


def reap_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs whose process is gone as failed and free their pool slots; returns their ids."""
    reaped = []
    home = Path(instance.root_directory)
    for run in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING])):
        owner = Owner(*json.loads(run.tags[OWNER_TAG])) if OWNER_TAG in run.tags else None
        if not (owner is not None and owner.is_alive() is False) and not is_gone(home, run.run_id):
            continue
        now = instance.get_run_by_id(run.run_id)
        if now is None or now.is_finished:  # in between, as runs do
            continue
        instance.report_run_failed(now, "The process that executed this run is gone.")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        reaped.append(run.run_id)
    sweep(home)
    return reaped
