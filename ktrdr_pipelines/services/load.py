"""Load one series for a person, in this process: what `ktrdr ib-load` does between parsing and printing.

Executes the asset's run on the project's Dagster instance. There is no second way to fetch: every bar comes through the asset.
Which series and which window are meant is `load_inputs.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ktrdr_pipelines.ib.contracts import Choice
from ktrdr_pipelines.ib.discovery import NO_CHOICE
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.loading.report import LoadReport
from ktrdr_pipelines.orchestration.resources import GatewayResource
from ktrdr_pipelines.orchestration.runs.entry_points import EntryPoint
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines.orchestration.runs.launch import execute_load
from ktrdr_pipelines.services.load_inputs import read_wanted
from ktrdr_pipelines.services.progress import Progress
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.schedule_overrides import open_store
from ktrdr_pipelines.universe.file import add_series


@dataclass
class LoadResult:
    """The report, and the Dagster runs that made it (none when there was nothing to load)."""

    report: LoadReport
    run_ids: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """The report's plain values."""
        return self.report.as_dict()


def load_series(
    symbol: str,
    timeframe: str,
    mode: str = "tail",
    *,
    start: str | None = None,
    end: str | None = None,
    choice: Choice = NO_CHOICE,
    progress: Progress | None = None,
    settings: Settings | None = None,
    origin: str = "cli",
    run_id: str | None = None,
) -> LoadResult:
    """Load the missing bars of ``symbol`` at ``timeframe``; see `modes.Mode` for ``mode``. Times are ISO 8601, start included,
    end not, a bare date is its midnight UTC. ``choice`` tells which contract a new symbol means. ``origin`` says which door it
    is; ``run_id`` (a UUID) is what Dagster shall call the run.

    Raises:
        KtrdrError: the input cannot be meant, or nothing could be begun. Windows that failed are in the report.
    """
    wanted = read_wanted(symbol, timeframe, mode, start=start, end=end, choice=choice, settings=settings)
    settings = wanted.settings
    progress = progress or Progress(enabled=False)
    address = GatewayResource.of(settings).address()
    with IBHistory(address, on_wait=progress.show_wait) as history:
        series = wanted.identify(history)
        store = open_store(settings.data_dir)
        put_right = store.prepare(series, now=wanted.now).describe()
        is_held = store.extent(series) is not None
        window, clipped = wanted.choose_window(series, store, history)
        if window.is_empty:
            return LoadResult(
                LoadReport(
                    series,
                    window,
                    merged_file=str(store.csv_path(series)),
                    cached_before=is_held,
                    notices=put_right,
                )
            )
        if wanted.universe.find(series.instrument.symbol, wanted.timeframe) is None:
            add_series(settings.universe_path, series)
        asked_before = history.requests_made
        with open_instance(settings) as instance:
            entry_point = EntryPoint(history=history, on_event=progress.show_event, on_wait=progress.show_wait)
            report, run_id = execute_load(
                settings,
                instance,
                series,
                window,
                entry_point=entry_point,
                origin=origin,
                mode=mode,
                run_id=run_id,
            )
        report.ib_requests_made += asked_before
        report.notices[:0] = put_right
        if clipped:
            report.notices.append(clipped)
        return LoadResult(report, [run_id])
