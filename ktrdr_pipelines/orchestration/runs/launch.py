"""Execute one series' asset in this process, as a Dagster run like every other: visible in the UI, partitions and all.

This is how commands and notebooks load. Only the one asset is built, which keeps a command quick however large the universe.
"""

from __future__ import annotations

import threading
import traceback
import uuid
from collections.abc import Collection

import dagster as dg
from sqlalchemy.exc import DBAPIError

from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.loading.report import LoadReport
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.build import build_definitions
from ktrdr_pipelines.orchestration.runs.entry_points import EntryPoint, lend
from ktrdr_pipelines.orchestration.runs.instance import explain_database
from ktrdr_pipelines.orchestration.runs.liveness import executing
from ktrdr_pipelines.orchestration.runs.load_run import LoadRun
from ktrdr_pipelines.orchestration.runs.tags import INTERRUPTED_TAG, NO_RETRY_TAGS, PARTITION_TAG
from ktrdr_pipelines.settings import Settings

_INTERRUPTS = ("DagsterExecutionInterruptedError", "KeyboardInterrupt")
"""What Ctrl-C makes of a step."""
_DATABASE_ERRORS = ("OperationalError", "InterfaceError", "DagsterPostgresException")
"""What Dagster's database makes of a step while it is away. A load itself uses no database but the ledger, whose errors are its
own."""

_one_run_at_a_time = threading.Lock()
"""Concurrent in-process runs in threads of one process deadlock on SQLite (docs/dagster_facts.md, 8)."""


def execute_load(
    settings: Settings, instance: dg.DagsterInstance, run: LoadRun, *, entry_point: EntryPoint
) -> tuple[LoadReport, str]:
    """Execute ``run``. Returns its report and its id.

    Failed windows are in the report, nothing is raised for them.

    Raises:
        KeyboardInterrupt: the user interrupted it; what was loaded is kept.
        StoreError: Dagster's database refuses.
        RuntimeError: the run failed for a reason that is not in the report: a bug, with its traceback.
    """
    run_id = str(uuid.uuid4())
    tags = run.tags()
    job = build_definitions(settings, [run.series]).resolve_implicit_global_asset_job_def()
    try:
        with _one_run_at_a_time, lend(entry_point), executing(instance, run_id):
            result = job.execute_in_process(
                instance=instance,
                run_id=run_id,
                asset_selection=[asset_key(run.series)],
                raise_on_error=False,
                partition_key=tags.pop(PARTITION_TAG, None),
                tags={**tags, **NO_RETRY_TAGS},
                # Users see progress and the report; Dagster's own log is in the UI.
                run_config={**run.run_config(), "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
    except Exception as error:
        # Dagster wraps what its database raises, in one exception or another.
        refusal = _find_refusal(error)
        if refusal is None:
            raise
        raise explain_database(str(refusal.orig), settings.dagster_home) from error
    if not instance.has_run(run_id):
        raise _explain_deleted(settings, run)
    if not result.success and _find_cause(result, _INTERRUPTS):
        instance.add_run_tags(run_id, {INTERRUPTED_TAG: "true"})
        raise KeyboardInterrupt
    if not result.success and (refused := _find_cause(result, _DATABASE_ERRORS)):
        raise explain_database(refused, settings.dagster_home)
    if not entry_point.reports or (not result.success and not entry_point.reports[-1].failures):
        raise RuntimeError(f"run {result.run_id} failed:\n{_explain(result)}")
    return entry_point.reports[-1], result.run_id


def _find_refusal(error: BaseException) -> DBAPIError | None:
    """The refusal of a database that caused ``error``, or came before it."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, DBAPIError):
        seen = seen.__cause__ or seen.__context__
    return seen


def _explain_deleted(settings: Settings, run: LoadRun) -> StoreError:
    return StoreError(
        f"the record of its run in {settings.dagster_home} was deleted by another program",
        doing=f"loading {run.series} {run.window}",
        advice="Bars in the CSV are kept. Load again: what is held is not requested again, and is recorded then.",
    )


def _find_cause(result: dg.ExecuteInProcessResult, names: Collection[str]) -> str:
    """The text of the error of one of these classes that made a step or the run fail; empty when none did."""
    for event in result.all_events:
        error = getattr(event.event_specific_data, "error", None)
        while error is not None:
            if error.cls_name in names:
                return str(error.message)
            error = error.cause
    return ""


def _explain(result: dg.ExecuteInProcessResult) -> str:
    errors = [
        e.event_specific_data.error.to_string()  # type: ignore[union-attr]
        for e in result.all_events
        if e.is_failure and getattr(e.event_specific_data, "error", None)
    ]
    return "\n".join(errors) or "".join(traceback.format_stack(limit=3))
