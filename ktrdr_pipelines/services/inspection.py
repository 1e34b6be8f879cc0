"""Inspect and adopt files of bars, for `ktrdr gaps` and `ktrdr adopt`: opens the files and Dagster's record of a series.

Needs no gateway. `gaps.py` counts and explains missing bars, `store/foreign.py` reads other programs' files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.partitions import partitions_in
from ktrdr_pipelines.domain.time import Window
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
    """The holding of one series, with damage (reads all of its rows).

    Raises:
        KtrdrError: invalid input, or the files cannot be read.
    """
    settings = settings or load_settings()
    series = name_series(symbol, timeframe, settings)
    damage = tuple(str(problem) for problem in open_store(settings.data_dir).verify(series))
    with PartitionRecord(settings) as record:
        return _inspect(series, settings, record, damage=damage)


def inspect_universe(settings: Settings | None = None) -> Iterator[Holding | Unreadable]:
    """The holding of every series of the universe, one after the other; a series that cannot be read does not stop the others.

    Raises:
        InputError: the universe file cannot be read.
    """
    settings = settings or load_settings()
    with PartitionRecord(settings) as record:
        for series in universe_of(settings):
            try:
                yield _inspect(series, settings, record, brief=True)
            except KtrdrError as error:
                yield Unreadable(series, error)


def _inspect(
    series: Series, settings: Settings, record: PartitionRecord, *, damage: tuple[str, ...] = (), brief: bool = False
) -> Holding:
    now = datetime.now(UTC)
    store = open_store(settings.data_dir)
    earliest = first_partition_start(series.timeframe, settings)
    partitions = partitions_in(
        series.timeframe, Window(min(earliest, now), now)
    )  # a generator: free if nothing is recorded
    with peek(store, series, now=now) as (view, pending):
        return inspect_series(
            series,
            view,
            file=store.csv_path(series),
            earliest=earliest,
            now=now,
            recorded=record.read(series, (p.key for p in partitions)),
            notices=[f"the next load: {text}" for text in pending.describe()],
            damage=damage,
            brief=brief,
        )


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
