"""Remove from Dagster's records what nothing needs, for `ktrdr prune`. The daily job does the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime

from sqlalchemy.exc import DBAPIError

from ktrdr_pipelines.orchestration.automation.retention import KeepRules
from ktrdr_pipelines.orchestration.runs.instance import explain_database, has_home, open_instance
from ktrdr_pipelines.orchestration.runs.liveness import reap_dead_runs
from ktrdr_pipelines.orchestration.runs.pruning import PruneReport, prune
from ktrdr_pipelines.settings import Settings, load_settings

logger = logging.getLogger(__name__)


def prune_records(
    settings: Settings | None = None, *, dry_run: bool = False, log: Callable[[str], object] = logger.debug
) -> PruneReport:
    """Remove expired runs with their logs, and old ticks; ``log`` receives progress. Where no Dagster home exists yet there is
    nothing to remove, and none is created.

    Raises:
        StoreError: Dagster's records cannot be used. What was removed so far is removed; partition status is true.
    """
    settings = settings or load_settings()
    if not has_home(settings):
        return PruneReport(dry_run=dry_run)
    rules = KeepRules.of(settings)
    try:
        with open_instance(settings) as instance:
            reap_dead_runs(instance)
            return prune(
                instance, rules.find_expiry, datetime.now(UTC), earliest=rules.shortest, dry_run=dry_run, log=log
            )
    except DBAPIError as error:
        raise explain_database(str(error.orig), settings.dagster_home) from error
