"""Opens Dagster's instance for our own entry points: without environment variables, initialised once.

Only one process may initialise a new home: four at once leave two alembic heads in it, permanently (docs/dagster_facts.md, 1).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import dagster as dg
from filelock import FileLock, Timeout
from sqlalchemy.exc import DBAPIError

from ktrdr_pipelines.domain.calls import OnWait, show_nothing
from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.settings import PROJECT_ROOT, Settings
from ktrdr_pipelines.store.locks import acquire_showing

_PACKAGED = Path(__file__).parents[1] / "home"
_CONFIG = "dagster.yaml"
_INITIALISED_WITHIN_S = 120.0


def open_instance(settings: Settings, on_wait: OnWait = show_nothing) -> dg.DagsterInstance:
    """The instance in the settings' Dagster home; a new home gets the project's `dagster.yaml`. ``on_wait`` is called when
    another process initialises the home for longer than a moment.

    Raises:
        StoreError: the folder cannot be written.
    """
    home = settings.dagster_home
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(home / ".initialising.lock")
        acquire_showing(lock, _INITIALISED_WITHIN_S, f"another process that initialises {home}", on_wait)
        try:
            _provide_config(home)
            instance = dg.DagsterInstance.from_config(str(home))
            instance.get_runs(limit=1)
        finally:
            lock.release()
    except Timeout:
        raise StoreError(f"{home} is being initialised by another process", advice="Try again in a moment.") from None
    except OSError as error:
        raise StoreError(
            f"DAGSTER_HOME {home} cannot be written: {error.strerror or error}",
            advice="Make it writable, or set DAGSTER_HOME to another folder.",
        ) from None
    except DBAPIError as error:
        raise explain_database(str(error.orig), home) from error
    return instance


def has_home(settings: Settings) -> bool:
    """True if the settings' Dagster home exists. Queries look first: a query does not create one."""
    return (settings.dagster_home / _CONFIG).exists()


def explain_database(cause: str, home: Path) -> StoreError:
    """The error for a failure of Dagster's database (a full disk, a read-only or damaged file, a server that is away)."""
    return StoreError(
        f"Dagster's records of DAGSTER_HOME {home} cannot be used: {' '.join(cause.split())[:500]}",
        advice="Is the disk full or read-only, or the database server away? Mend that, or set DAGSTER_HOME to another folder, "
        "and try again. Bars in the CSV are kept.",
    )


def provided_file(path: str) -> Path:
    """The project's file at ``path``; if the package is installed without its project (in a container), the packaged copy."""
    ours = PROJECT_ROOT / path
    return ours if ours.exists() else _PACKAGED / ours.name


def _provide_config(home: Path) -> None:
    target = home / _CONFIG
    if not target.exists():
        shutil.copyfile(provided_file(f"dagster_home/{_CONFIG}"), target)
