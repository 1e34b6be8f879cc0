"""Partition keys and windows of each timeframe, as pure functions.

`orchestration/partition_definitions.py` builds Dagster's definitions of the same grid; a test compares the two. Store and load
need the grid without Dagster. All partitions are UTC (docs/design.md, 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from ktrdr_pipelines.domain.time import Window, require_utc
from ktrdr_pipelines.domain.timeframes import PartitionUnit, Timeframe
from ktrdr_pipelines.errors import InputError

_FORMAT: dict[PartitionUnit, str] = {"day": "%Y-%m-%d", "week": "%Y-%m-%d", "month": "%Y-%m-%d", "year": "%Y"}


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition: Dagster's key (``2024-03-05``, for a year ``2024``) and its window.

    Friday's window of a weekday grid runs to Monday 00:00 UTC, so that no partition is always empty; weeks start on
    Sunday.
    """

    key: str
    window: Window


class Recorded(StrEnum):
    """Dagster's record of a partition; a partition without record is left out of mappings."""

    COMPLETE = "complete"
    FAILED = "failed"
    UNDER_WAY = "under way"


def _floor(unit: PartitionUnit, t: datetime) -> datetime:
    day = t.replace(hour=0, minute=0, second=0, microsecond=0)
    if unit == "day":
        return day - timedelta(days=max(0, day.weekday() - 4))
    if unit == "week":
        return day - timedelta(days=(day.weekday() + 1) % 7)
    if unit == "month":
        return day.replace(day=1)
    return day.replace(month=1, day=1)


def _next(unit: PartitionUnit, start: datetime) -> datetime:
    if unit == "day":
        return start + timedelta(days=3 if start.weekday() == 4 else 1)
    if unit == "week":
        return start + timedelta(days=7)
    if unit == "month":
        return (start + timedelta(days=31)).replace(day=1)
    return start.replace(year=start.year + 1)


def _partition(unit: PartitionUnit, start: datetime) -> Partition:
    return Partition(start.strftime(_FORMAT[unit]), Window(start, _next(unit, start)))


def partition_at(timeframe: Timeframe, instant: datetime) -> Partition:
    """The partition that contains ``instant`` (aware)."""
    return _partition(timeframe.partition, _floor(timeframe.partition, require_utc(instant)))


def partitions_in(timeframe: Timeframe, window: Window) -> Iterator[Partition]:
    """Every partition that shares an instant with ``window``, oldest first; none for an empty window."""
    unit = timeframe.partition
    start = _floor(unit, window.start)
    while start < window.end and not window.is_empty:
        partition = _partition(unit, start)
        yield partition
        start = partition.window.end


def partition_from_key(timeframe: Timeframe, key: str) -> Partition:
    """The partition with the key ``key``.

    Raises:
        InputError: not a key of this timeframe's grid (a Saturday, say, or a month key that is not the 1st).
    """
    try:
        instant = datetime.strptime(key, _FORMAT[timeframe.partition]).replace(tzinfo=UTC)
    except ValueError:
        instant = None
    if instant is None or (partition := partition_at(timeframe, instant)).key != key:
        raise InputError(
            f"{key!r} is not a partition of {timeframe.name}",
            advice=f"Keys look like {partition_at(timeframe, datetime(2024, 3, 5, tzinfo=UTC)).key}.",
        )
    return partition
