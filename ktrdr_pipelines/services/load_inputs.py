"""What a person wants loaded, and which window of the series that means: with this a load begins, and its dry run.

What is wrong by itself (a date, a window before all partitions) is refused before anybody is asked. Which contract an unknown
symbol means, and where its history starts, is `ib/discovery.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from ktrdr_pipelines.domain.instruments import Series, file_symbol
from ktrdr_pipelines.domain.time import Window, format_instant, parse_range
from ktrdr_pipelines.domain.timeframes import Timeframe, parse_timeframe
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.ib.contracts import Choice
from ktrdr_pipelines.ib.discovery import (
    NO_CHOICE,
    describe_retention,
    estimate_history_start,
    identify_series,
    retention_start,
)
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.orchestration.partition_definitions import first_partition_start
from ktrdr_pipelines.planning.coverage import valid_history_start_s
from ktrdr_pipelines.planning.modes import Held, Mode, needs_history_start, resolve_window
from ktrdr_pipelines.settings import Settings, load_settings
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines.universe.file import Universe, universe_of


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for at ``now``, checked as far as that goes without asking anybody."""

    symbol: str
    timeframe: Timeframe
    mode: Mode
    start: datetime | None
    end: datetime | None
    choice: Choice
    now: datetime
    settings: Settings
    universe: Universe

    def identify(self, history: IBHistory) -> Series:
        """The series that is meant; IB is asked only about a symbol that the universe does not name.

        Raises:
            KtrdrError: as `discovery.identify_series`.
        """
        return identify_series(self.symbol, self.timeframe, self.universe, history, self.choice)

    def choose_window(self, series: Series, store: Store, history: IBHistory) -> tuple[Window, str]:
        """The window that the mode means for what ``store`` holds, from the first partition on (empty: nothing is to be loaded);
        and what a person has to know of it, if anything. IB is asked only where history starts, and only if the window
        begins there and the sidecar does not know.

        Raises:
            InputError: the dates cannot be meant; said before IB is asked anything.
        """
        window = self._resolve(series, store, history)
        if window.is_empty:
            return window, ""
        first = refuse_before_partitions(self.timeframe, window.start, window.end, self.settings)
        kept = retention_start(self.timeframe, self.now)
        clipped = Window(max(window.start, first, kept or first), window.end)
        if clipped == window:
            return clipped, ""
        return clipped, describe_retention(series, kept) if clipped.start == kept else _say_clipped(
            series, clipped, window
        )

    def _resolve(self, series: Series, store: Store, history: IBHistory) -> Window:
        limits = self.settings.history_limits
        held = Held.of(store.extent(series), store.read_sidecar(series))
        earliest = first_partition_start(series.timeframe, self.settings)

        def resolve(history_start: datetime) -> Window:
            return resolve_window(
                self.mode,
                series,
                held,
                now=self.now,
                start=self.start,
                end=self.end,
                history_start=history_start,
                limits=limits,
            )

        window = resolve(earliest)
        if not needs_history_start(self.mode, held, self.start):
            return window
        if series.instrument.ends_now:
            start_s = valid_history_start_s(store.read_sidecar(series), None) or 0
            reach = estimate_history_start(series, history, earliest=earliest, now=self.now, limits=limits)
            begin = max(reach, datetime.fromtimestamp(start_s, UTC))
            return resolve(min(begin, held.first) if held is not None else begin)
        known_s = valid_history_start_s(store.read_sidecar(series), int(held.first.timestamp()) if held else None)
        if known_s is not None:
            return resolve(max(earliest, datetime.fromtimestamp(known_s, UTC)))
        return resolve(estimate_history_start(series, history, earliest=earliest, now=self.now, limits=limits))


def read_wanted(
    symbol: str,
    timeframe: str,
    mode: str,
    *,
    start: str | None = None,
    end: str | None = None,
    choice: Choice = NO_CHOICE,
    settings: Settings | None = None,
) -> Wanted:
    """What the words of a person mean; times as `series.parse_range` reads them.

    Raises:
        InputError: they cannot be meant, or all of the window lies before the first partition.
    """
    wanted_timeframe = parse_timeframe(timeframe)
    wanted_mode = Mode(mode)
    file_symbol(symbol)
    now = datetime.now(UTC)
    first, last = parse_range(start, end, now=now)
    settings = settings or load_settings()
    refuse_before_partitions(wanted_timeframe, first, last, settings)
    return Wanted(
        symbol, wanted_timeframe, wanted_mode, first, last, choice, now, settings, universe_of(settings)
    )  # fmt: skip


def refuse_before_partitions(
    timeframe: Timeframe, start: datetime | None, end: datetime | None, settings: Settings
) -> datetime:
    """Where partitions of ``timeframe`` begin.

    Raises:
        InputError: a window that ends at ``end`` lies before that altogether, or before what IB keeps.
    """
    first = first_partition_start(timeframe, settings)
    kept = retention_start(timeframe, datetime.now(UTC))
    if end is not None and kept is not None and first < end <= kept:
        raise InputError(
            f"IB keeps {timeframe} bars for six months, and nothing before {kept:%Y-%m-%d} can be had: the window ends "
            f"{format_instant(end)}",
            advice="Give a later end, or a longer timeframe.",
        )
    if end is not None and end <= first:
        further = start or end - timedelta(days=366)
        raise InputError(
            f"{timeframe} partitions begin {first:%Y-%m-%d}, and nothing before that is loaded: the window ends "
            f"{format_instant(end)}",
            advice=f'Set KTRDR_PARTITION_STARTS={{"{timeframe}": "{further:%Y-%m-%d}"}} to reach further back.',
        )
    return first


def _say_clipped(series: Series, clipped: Window, window: Window) -> str:
    """That less is asked for than was wanted, and which setting reaches further back."""
    return (
        f"nothing before {format_instant(clipped.start)} was asked, where {series.timeframe} partitions begin; "
        f"KTRDR_PARTITION_STARTS reaches back to {window.start:%Y-%m-%d}"
    )
