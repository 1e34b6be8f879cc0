"""Inspect and adopt files of bars, for `ktrdr gaps` and `ktrdr adopt`: opens the files and Dagster's record of a series.

Needs no gateway. `gaps.py` counts and explains missing bars, `store/foreign.py` reads other programs' files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.partitions import partitions_in
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import InputError, KtrdrError
from ktrdr_pipelines.orchestration.automation.reconcile import report_held
from ktrdr_pipelines.orchestration.partition_definitions import first_partition_start
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines.orchestration.runs.queries import PartitionRecord
from ktrdr_pipelines.services.gaps import Holding, inspect_series
from ktrdr_pipelines.services.membership import name_series
from ktrdr_pipelines.settings import Settings, load_settings
from ktrdr_pipelines.store.schedule_overrides import open_store
from ktrdr_pipelines.store.settle import Adopted
from ktrdr_pipelines.store.snapshot import peek
from ktrdr_pipelines.universe.file import universe_of


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A series whose files cannot be read."""

    series: Series
    error: KtrdrError

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "symbol": self.series.instrument.symbol,
            "timeframe": self.series.timeframe.name,
            "kind": self.error.family,
            "error": str(self.error),
        }


@dataclass(frozen=True, slots=True)
class Adoption:
    """What was done with another program's file."""

    series: Series
    source: Path
    csv: Path
    adopted: Adopted
    rows_held: int
    reported: int
    """Partitions that were reported to Dagster as complete."""
    notices: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON. ``line`` is 0 for a row that was dropped because another bar was held already."""
        return {
            "symbol": self.series.instrument.symbol,
            "timeframe": self.series.timeframe.name,
            "source": str(self.source),
            "file": str(self.csv),
            "rows_adopted": self.adopted.rows,
            "rows_held": self.rows_held,
            "dropped": [{"line": f.line, "reason": f.why, "text": f.text} for f in self.adopted.dropped],
            "notices": [*self.adopted.notices, *self.notices],
            "partitions_reported": self.reported,
            "partitions_unreported": 0,
            "backup": str(self.adopted.backup) if self.adopted.backup else None,
        }


def inspect_one(symbol: str, timeframe: str, settings: Settings | None = None) -> Holding:
    """The holding of one series, with damage (checks all of its rows).

    Raises:
        KtrdrError: invalid input, or the files cannot be read.
    """
    settings = settings or load_settings()
    series = name_series(symbol, timeframe, settings)
    with _Inspector(settings, datetime.now(UTC)) as inspector:
        damage = tuple(str(problem) for problem in inspector.store.verify(series))
        return inspector.inspect(series, damage=damage)


def inspect_universe(settings: Settings | None = None) -> Iterator[Holding | Unreadable]:
    """The holding of every series of the universe, one after the other, all at one instant; a series that cannot be read does not
    stop the others.

    Raises:
        InputError: the universe file cannot be read.
    """
    settings = settings or load_settings()
    with _Inspector(settings, datetime.now(UTC)) as inspector:
        for series in universe_of(settings):
            try:
                yield inspector.inspect(series)
            except KtrdrError as error:
                yield Unreadable(series, error)


class _Inspector:
    """The files and Dagster's record of many series at the instant ``now``. A context manager."""

    def __init__(self, settings: Settings, now: datetime) -> None:
        self.store = open_store(settings.data_dir)
        self._settings, self._now = settings, now
        self._record = PartitionRecord(settings)
        self._keys: dict[Timeframe, tuple[str, ...]] = {}

    def __enter__(self) -> Self:
        self._record.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._record.__exit__(kind, error, trace)

    def inspect(self, series: Series, *, damage: tuple[str, ...] = ()) -> Holding:
        """The holding of one series. Raises KtrdrError."""
        with peek(self.store, series, now=self._now) as (view, pending):
            return inspect_series(
                series,
                view,
                file=self.store.csv_path(series),
                earliest=first_partition_start(series.timeframe, self._settings),
                now=self._now,
                recorded=self._record.read(series, self._list_keys(series.timeframe)),
                notices=[f"the next load: {text}" for text in pending.describe()],
                damage=damage,
            )

    def _list_keys(self, timeframe: Timeframe) -> Iterator[str]:
        """The keys of all partitions of ``timeframe``, listed once, and only if they are read."""
        if timeframe not in self._keys:
            earliest = first_partition_start(timeframe, self._settings)
            window = Window(min(earliest, self._now), self._now)
            self._keys[timeframe] = tuple(partition.key for partition in partitions_in(timeframe, window))
        yield from self._keys[timeframe]


def adopt_file(
    symbol: str, timeframe: str, path: Path, *, assume_utc: bool = False, settings: Settings | None = None
) -> Adoption:
    """Add the bars of the CSV at ``path`` to the series; see `Store.adopt`. Complete partitions are reported to
    Dagster.

    Raises:
        KtrdrError: invalid input, ``path`` is not a file of bars, or the disk refuses.
    """
    settings = settings or load_settings()
    series = name_series(symbol, timeframe, settings)
    try:
        is_file = path.is_file()
    except OSError:  # not a valid file name
        is_file = False
    if not is_file:
        raise InputError(f"no file {str(path)[:200]}", doing=f"adopting it as {series}", advice="Check the path.")
    store = open_store(settings.data_dir)
    adopted = store.adopt(series, path, now=datetime.now(UTC), assume_utc=assume_utc)
    notices: tuple[str, ...] = ()
    reported = 0
    try:
        with open_instance(settings) as instance:
            reported = report_held(settings, instance, series, datetime.now(UTC))
    except KtrdrError as error:  # the bars are in the file; the sensor reports later
        notices = (f"complete partitions were not reported to Dagster: {error}",)
    rows = store.read_sidecar(series).rows
    return Adoption(series, path, store.csv_path(series), adopted, rows, reported, notices)
