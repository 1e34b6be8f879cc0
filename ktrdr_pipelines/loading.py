"""Load one series for a person, in this process: what `ktrdr ib-load` does between parsing and printing.

Finds the series (discovering an unknown one), turns the mode into a window, and executes the asset's run on the project's
Dagster instance. There is no second way to fetch: every bar comes through the asset.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from ktrdr_pipelines.coverage import valid_history_start_s
from ktrdr_pipelines.discovery import NO_CHOICE, estimate_history_start, identify_series
from ktrdr_pipelines.ib.contracts import Choice
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.modes import Held, Mode, needs_history_start, resolve_window
from ktrdr_pipelines.orchestration.door import Door
from ktrdr_pipelines.orchestration.instance import open_instance
from ktrdr_pipelines.orchestration.partitions import first_partition_start
from ktrdr_pipelines.orchestration.resources import GatewayResource
from ktrdr_pipelines.orchestration.runs import clip_to_partitions, execute_load
from ktrdr_pipelines.progress import Progress
from ktrdr_pipelines.report import LoadReport
from ktrdr_pipelines.series import Series, Window, format_instant, parse_range, parse_timeframe
from ktrdr_pipelines.settings import Settings, load_settings
from ktrdr_pipelines.store.corrections import open_store
from ktrdr_pipelines.store.series_store import Store
from ktrdr_pipelines.universe import add_series, read_universe


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
    wanted_timeframe = parse_timeframe(timeframe)
    wanted_mode = Mode(mode)
    now = datetime.now(UTC)
    first, last = parse_range(start, end, now=now)
    settings = settings or load_settings()
    progress = progress or Progress(enabled=False)
    universe = read_universe(settings.universe_path, must_exist=settings.universe_file is not None)
    address = GatewayResource.of(settings).address()
    with IBHistory(address, on_wait=progress.show_wait) as history:
        series = identify_series(symbol, wanted_timeframe, universe, history, choice)
        store = open_store(settings.data_dir)
        put_right = store.prepare(series, now=now).describe()
        held = Held.of(store.extent(series), store.read_sidecar(series))
        window = choose_window(
            series, wanted_mode, store, settings=settings, history=history, start=first, end=last, now=now
        )
        if window.is_empty:
            return LoadResult(
                LoadReport(
                    series,
                    window,
                    merged_file=str(store.csv_path(series)),
                    cached_before=bool(held),
                    notices=put_right,
                )
            )
        clipped = clip_to_partitions(series, window, settings)
        if universe.find(series.instrument.symbol, wanted_timeframe) is None:
            add_series(settings.universe_path, series)
        asked_before = history.requests_made
        instance = open_instance(settings)
        with instance:
            door = Door(history=history, on_event=progress.show_event, on_wait=progress.show_wait)
            report, run_id = execute_load(
                settings,
                instance,
                series,
                clipped,
                door=door,
                origin=origin,
                mode=mode,
                run_id=run_id,
            )
        report.ib_requests_made += asked_before
        report.notices[:0] = put_right
        if clipped != window:
            report.notices.append(say_clipped(series, clipped, window))
        return LoadResult(report, [run_id])


def choose_window(
    series: Series,
    mode: Mode,
    store: Store,
    *,
    settings: Settings,
    history: IBHistory,
    start: datetime | None,
    end: datetime | None,
    now: datetime,
) -> Window:
    """The window that ``mode`` means for what ``store`` holds. IB is asked only where history starts, and only if the window
    begins there and the sidecar does not know.

    Raises:
        InputError: the dates cannot be meant; said before IB is asked anything.
    """
    held = Held.of(store.extent(series), store.read_sidecar(series))
    earliest = first_partition_start(series.timeframe, settings)

    def resolve(history_start: datetime) -> Window:
        return resolve_window(
            mode,
            series,
            held,
            now=now,
            start=start,
            end=end,
            history_start=history_start,
            limits=settings.history_limits,
        )

    window = resolve(earliest)
    if not needs_history_start(mode, held, start):
        return window
    if series.instrument.ends_now:
        start_s = valid_history_start_s(store.read_sidecar(series), None) or 0
        reach = estimate_history_start(series, history, earliest=earliest, now=now, limits=settings.history_limits)
        begin = max(reach, datetime.fromtimestamp(start_s, UTC))
        return resolve(min(begin, held.first) if held is not None else begin)
    known_s = valid_history_start_s(store.read_sidecar(series), int(held.first.timestamp()) if held else None)
    if known_s is not None:
        return resolve(max(earliest, datetime.fromtimestamp(known_s, UTC)))
    return resolve(estimate_history_start(series, history, earliest=earliest, now=now, limits=settings.history_limits))


def say_clipped(series: Series, clipped: Window, window: Window) -> str:
    """That less is asked for than was wanted, and which setting reaches further back."""
    return (
        f"nothing before {format_instant(clipped.start)} was asked, where {series.timeframe} partitions begin; "
        f"KTRDR_PARTITION_STARTS reaches back to {window.start:%Y-%m-%d}"
    )
