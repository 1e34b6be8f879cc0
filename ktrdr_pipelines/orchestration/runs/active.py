"""Which series are in a run that has not ended, whoever started it: nobody asks for the same bars twice at once.

Runs of dead processes are reaped by `dead_runs.py`; without that they would count as going for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.runs.liveness import reap_dead_runs

_GOING = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]

_LAUNCH_TIMEOUT = timedelta(hours=1)
"""A run that was made and not launched for so long never will be: whoever made it died in between."""


@dataclass(frozen=True)
class ActiveRuns:
    """By asset the id of a run that has not ended; ``of_all`` is one that was not told which assets."""

    by_asset: dict[dg.AssetKey, str]
    of_all: str = ""

    def find(self, series: Series) -> str:
        """The id of a run that ``series`` is in; empty when there is none."""
        return self.of_all or self.by_asset.get(asset_key(series), "")


def find_active_runs(instance: dg.DagsterInstance, now: datetime) -> ActiveRuns:
    """The runs that have not ended, after reaping those whose process is gone."""
    reap_dead_runs(instance)
    by_asset: dict[dg.AssetKey, str] = {}
    of_all = ""
    for record in instance.get_run_records(dg.RunsFilter(statuses=_GOING)):
        run = record.dagster_run
        made = record.create_timestamp
        made = made.replace(tzinfo=UTC) if made.tzinfo is None else made
        if run.status is dg.DagsterRunStatus.NOT_STARTED and now - made > _LAUNCH_TIMEOUT:
            continue
        if run.asset_selection is None:
            of_all = run.run_id
        else:
            by_asset |= dict.fromkeys(run.asset_selection, run.run_id)
    return ActiveRuns(by_asset, of_all)
