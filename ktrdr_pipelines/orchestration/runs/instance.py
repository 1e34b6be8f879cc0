"""Dagster's instance for doors of our own: found without environment variables, initialised once.

A fresh home must be initialised by one process alone: four at once leave two alembic heads in it, for ever
(docs/dagster_facts.md, 1).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import dagster as dg
from filelock import FileLock, Timeout
from sqlalchemy.exc import DBAPIError

from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.settings import PROJECT_ROOT, Settings

ORIGIN_TAG = "ktrdr/origin"

_BROUGHT_ALONG = Path(__file__).parents[1] / "home"


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
    except DBAPIError as error:
        raise explain_database(error, home) from error
    return instance


def explain_database(error: DBAPIError, home: Path) -> StoreError:
    """What a person can do when Dagster's database refuses (a full disk, a read-only or damaged file)."""
    return StoreError(
        f"Dagster's records in DAGSTER_HOME {home} cannot be used: {error.orig}",
        advice="Is the disk full or read-only? Free some space or set DAGSTER_HOME to another folder, and run it again. "
        "Bars that are in the CSV are kept.",
    )


def provided_file(path: str) -> Path:
    """The project's file at ``path``; where the package is installed without its project (in a container), the copy that
    it brings along."""
    ours = PROJECT_ROOT / path
    return ours if ours.exists() else _BROUGHT_ALONG / ours.name


def _provide_config(home: Path) -> None:
    target = home / "dagster.yaml"
    if not target.exists():
        shutil.copyfile(provided_file("dagster_home/dagster.yaml"), target)
