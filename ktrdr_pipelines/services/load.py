"""Load one series for a user, in this process: what `ktrdr ib-load` does between parsing and printing.

Executes the asset's run on the project's Dagster instance. There is no second way to fetch: every bar comes through the asset.
Which series and partitions a request means is `load_inputs.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from ktrdr_pipelines.domain.load_request import LoadRequest
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.loading.report import LoadReport
from ktrdr_pipelines.orchestration.resources import GatewayResource
from ktrdr_pipelines.orchestration.runs.entry_points import EntryPoint
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines.orchestration.runs.launch import execute_load
from ktrdr_pipelines.orchestration.runs.load_run import LoadRun
from ktrdr_pipelines.services.load_inputs import choose_window, identify
from ktrdr_pipelines.services.progress import Progress
from ktrdr_pipelines.settings import Settings, load_settings
from ktrdr_pipelines.store.schedule_overrides import open_store
from ktrdr_pipelines.store.snapshot import peek
from ktrdr_pipelines.universe.file import add_series, universe_of


@dataclass
class LoadResult:
    """The report, and the Dagster runs that made it (none when there was nothing to load)."""

    report: LoadReport
    run_ids: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """The report's plain values."""
        return self.report.as_dict()


def load_series(
    request: LoadRequest, *, progress: Progress | None = None, settings: Settings | None = None, origin: str = "cli"
) -> LoadResult:
    """Load the missing bars that ``request`` means. ``origin`` names the entry point.

    Raises:
        KtrdrError: invalid input, or the load could not begin. Windows that failed are in the report.
    """
    settings = settings or load_settings()
    progress = progress or Progress(enabled=False)
    with IBHistory(GatewayResource.of(settings).address(), on_wait=progress.show_wait) as history:
        found = prepare_load(request, settings, history, origin=origin)
        if isinstance(found, LoadReport):
            return LoadResult(found)
        asked_before = history.costs.requests
        with open_instance(settings, progress.show_wait) as instance:
            entry_point = EntryPoint(history=history, on_event=progress.show_event, on_wait=progress.show_wait)
            report, run_id = execute_load(settings, instance, found, entry_point=entry_point)
        report.ib_requests_made += asked_before
        return LoadResult(report, [run_id])


def prepare_load(request: LoadRequest, settings: Settings, history: IBHistory, *, origin: str) -> LoadRun | LoadReport:
    """The run that serves ``request``; a report where there is nothing to load.

    A series that the universe does not name yet is added to it, once there is something to load.

    Raises:
        KtrdrError: invalid input, or IB refuses or does not answer where it has to be asked.
    """
    series, request = identify(request, settings, history)
    store, now = open_store(settings.data_dir), datetime.now(UTC)
    with peek(store, series, now=now) as (found, _):
        chosen = choose_window(request, series, found, history, settings, now)
    if chosen.window.is_empty:
        notices = store.prepare(series, now=now).describe()
        is_held = store.extent(series) is not None
        return LoadReport(
            series,
            chosen.window,
            merged_file=str(store.csv_path(series)),
            cached_before=is_held,
            notices=notices,
        )
    if universe_of(settings).find(series.instrument.symbol, series.timeframe) is None:
        add_series(settings.universe_path, series)
    return LoadRun(series, request, chosen.window, chosen.oldest, origin, chosen.notice)
