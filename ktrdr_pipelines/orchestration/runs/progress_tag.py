"""How far a run is, as a tag of the run: for a load that the daemon executes and a user follows from another process.

A tag is rewritten in place, so that a load of thousands of requests leaves one small record.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import dagster as dg
from sqlalchemy.exc import SQLAlchemyError

from ktrdr_pipelines.domain.calls import Waiting
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.loading.report import Event, Failure, Fetched, Planned
from ktrdr_pipelines.orchestration.runs.entry_points import EntryPoint

PROGRESS_TAG = "ktrdr/progress"
WRITE_EVERY_S = 1.0

NO_PROGRESS: Mapping[str, Any] = {
    "requests_planned": 0,
    "requests_done": 0,
    "bars": 0,
    "windows_failed": 0,
    "waiting_for": None,
    "waiting_until": None,
}


def follow_in_tag(instance: dg.DagsterInstance, run_id: str) -> EntryPoint:
    """Listeners that keep the tag of the run, at most once a second; over all series of the run."""
    counts, written_s = dict(NO_PROGRESS), float("-inf")

    def write(*, at_once: bool = False) -> None:
        nonlocal written_s
        if not at_once and time.monotonic() - written_s < WRITE_EVERY_S:
            return
        with suppress(dg.DagsterError, SQLAlchemyError):  # a busy database; the load does not depend on it
            instance.add_run_tags(run_id, {PROGRESS_TAG: json.dumps(counts)})
        written_s = time.monotonic()

    def on_event(_series: Series, event: Event) -> None:
        counts.update(waiting_for=None, waiting_until=None)
        if isinstance(event, Planned):
            counts["requests_planned"] += len(event.requests)
        elif isinstance(event, Fetched):
            counts["requests_done"] += 1
            counts["bars"] += event.rows
        elif isinstance(event, Failure):
            counts["windows_failed"] += 1
        else:
            return
        write(at_once=isinstance(event, Planned))

    def on_wait(waiting: Waiting) -> None:
        until = format_instant(waiting.until) if waiting.until else None
        counts.update(waiting_for=waiting.reason, waiting_until=until)
        write(at_once=waiting.seconds >= WRITE_EVERY_S)

    return EntryPoint(on_event=on_event, on_wait=on_wait)


def read_progress(run: dg.DagsterRun) -> Mapping[str, Any]:
    """The progress of ``run``."""
    try:
        return {**NO_PROGRESS, **json.loads(run.tags.get(PROGRESS_TAG, "{}"))}
    except (ValueError, TypeError):
        return NO_PROGRESS
