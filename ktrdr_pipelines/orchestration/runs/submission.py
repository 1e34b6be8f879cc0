"""Submit a load to Dagster's queue, through the client that Dagster publishes for it."""

from __future__ import annotations

from urllib.parse import urlsplit

from dagster_graphql import DagsterGraphQLClient, DagsterGraphQLClientError

from ktrdr_pipelines.errors import TransientError
from ktrdr_pipelines.orchestration.runs.load_run import LoadRun
from ktrdr_pipelines.orchestration.runs.tags import RETRY_TAGS

LOCATION = "ktrdr_pipelines"
"""The code location, as `workspace.yaml` names it."""
_REPOSITORY, _JOB = "__repository__", "__ASSET_JOB"
"""Dagster's names for all definitions of a location, and for the job that is made of its assets."""


def submit_run(url: str, run: LoadRun) -> str:
    """Put ``run`` in the queue of the Dagster at ``url``. Returns its run id.

    The location is loaded again where it does not know the series yet.

    Raises:
        TransientError: Dagster does not accept it.
    """
    parts = urlsplit(url)
    try:
        client = DagsterGraphQLClient(
            parts.hostname or "", parts.port, use_https=parts.scheme == "https", path_prefix=parts.path.rstrip("/")
        )
        try:
            return _submit(client, run)
        except (DagsterGraphQLClientError, KeyError):  # KeyError: what the client makes of an unknown asset
            client.reload_repository_location(LOCATION)
            return _submit(client, run)
    except (DagsterGraphQLClientError, KeyError) as error:
        raise TransientError(
            f"Dagster at {url} does not accept a run of {run.series}: {str(error.__cause__ or error)[:300]}",
            advice="Ask again in a minute; see the log of the Dagster web server.",
        ) from error


def _submit(client: DagsterGraphQLClient, run: LoadRun) -> str:
    return client.submit_job_execution(
        _JOB,
        repository_location_name=LOCATION,
        repository_name=_REPOSITORY,
        run_config=run.run_config(),
        tags={**run.tags(), **RETRY_TAGS},
        asset_selection=[list(run.series.asset_path)],
    )
