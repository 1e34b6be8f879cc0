"""Ranges of partitions whose load a user cancelled, until a user requests them again. No sensor and no schedule loads them.

Read from Dagster's runs: a run that ended as CANCELED, or that Ctrl-C interrupted (`runs/launch.py`), adds its partitions; a
later run that a user started removes its own. The result is kept in Dagster's key-value table, so that it outlives the runs, and
all sensors and schedules share it. A cancellation says nothing about bars that close after it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import chain

import dagster as dg

from ktrdr_pipelines.domain.instruments import ASSET_ROOT
from ktrdr_pipelines.domain.partitions import partition_from_key
from ktrdr_pipelines.domain.timeframes import parse_timeframe
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.orchestration.runs.tags import (
    INTERRUPTED_TAG,
    ORIGIN_TAG,
    PARENT_TAG,
    PARTITION_TAG,
    RANGE_END_TAG,
    RANGE_START_TAG,
    RETRY_NUMBER_TAG,
    Origin,
)

STATE_KEY = "ktrdr/cancelled_ranges"
"""Where the ranges are in Dagster's key-value table."""

FIRST_LOOK_BACK = timedelta(days=30)
"""How old a cancelled run may be when a Dagster home is looked at for the first time."""

_OVERLAP = timedelta(hours=1)
"""Runs that ended so long before the last look are read again: machines' clocks differ, and records appear late. To read one
twice changes nothing."""

_AUTOMATIC = frozenset({Origin.SENSOR, Origin.SCHEDULE, Origin.RECONCILE, Origin.GAP_FILL})
_Status = dg.DagsterRunStatus


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A half-open range of one series, epoch seconds, and when its load was cancelled. It ends at that time at the latest."""

    start_s: int
    end_s: int
    at_s: int


@dataclass
class CancelledRanges:
    """By the name of the series (``AAPL_1h``), sorted and disjoint. ``seen_s``: events up to then are included."""

    by_series: dict[str, list[Cancelled]] = field(default_factory=dict)
    seen_s: float = 0.0

    def find(self, name: str) -> Sequence[Cancelled]:
        """The cancelled ranges of the series ``name``."""
        return self.by_series.get(name, ())

    def cancel(self, name: str, start_s: int, end_s: int, at_s: float) -> None:
        """A user cancelled the load of this range."""
        added = Cancelled(start_s, min(end_s, int(at_s)), int(at_s))
        self.request_again(name, start_s, end_s)
        if added.start_s < added.end_s:
            self.by_series[name] = sorted([*self.find(name), added], key=lambda each: each.start_s)

    def request_again(self, name: str, start_s: int, end_s: int) -> None:
        """A user started a load of this range."""
        rest = []
        for each in self.find(name):
            parts = ((each.start_s, min(each.end_s, start_s)), (max(each.start_s, end_s), each.end_s))
            rest += [Cancelled(lo, hi, each.at_s) for lo, hi in parts if lo < hi]
        self.by_series.pop(name, None)
        if rest:
            self.by_series[name] = rest

    def to_json(self) -> str:
        """For `from_json`."""
        ranges = {name: [[e.start_s, e.end_s, e.at_s] for e in each] for name, each in sorted(self.by_series.items())}
        return json.dumps({"seen": self.seen_s, "series": ranges})

    @classmethod
    def from_json(cls, text: str | None) -> CancelledRanges:
        """Empty if ``text`` is not ours."""
        try:
            found = json.loads(text or "")
            ranges = {str(name): [Cancelled(*map(int, e)) for e in each] for name, each in found["series"].items()}
            return cls(ranges, float(found["seen"]))
        except (ValueError, TypeError, KeyError, AttributeError):
            return cls()


def read_cancelled(instance: dg.DagsterInstance, now: datetime) -> CancelledRanges:
    """The cancelled ranges at ``now``, after the runs since the last look were added to them.

    Sensors and schedules may read at the same time: each stores what the same runs lead to.
    """
    stored = instance.daemon_cursor_storage.get_cursor_values({STATE_KEY}).get(STATE_KEY)
    found = CancelledRanges.from_json(stored)
    since = datetime.fromtimestamp(found.seen_s, UTC) - _OVERLAP if found.seen_s else now - FIRST_LOOK_BACK
    ended = [record for record in _read_ended(instance, since) if _ended_at(record) >= since.timestamp()]
    events: list[tuple[float, bool, dg.RunRecord]] = [(_ended_at(record), True, record) for record in ended]
    if events or found.by_series:
        started = instance.get_run_records(dg.RunsFilter(created_after=since))
        events += [(r.create_timestamp.timestamp(), False, r) for r in started if is_by_user(r.dagster_run.tags)]
    for at_s, is_end, record in sorted(events, key=lambda event: event[:2]):
        for name, start_s, end_s in _ranges_of(record.dagster_run):
            if is_end:
                found.cancel(name, start_s, end_s, at_s)
            else:
                found.request_again(name, start_s, end_s)
    found.seen_s = now.timestamp()
    if (text := found.to_json()) != stored:
        instance.daemon_cursor_storage.set_cursor_values({STATE_KEY: text})
    return found


def is_by_user(tags: Mapping[str, str]) -> bool:
    """True for the tags of a run that a user asked for: no sensor, schedule or automatic retry. A re-execution that a user starts
    has the tags of the run that it repeats."""
    if RETRY_NUMBER_TAG in tags:
        return False
    return tags.get(ORIGIN_TAG) not in _AUTOMATIC or PARENT_TAG in tags


def _read_ended(instance: dg.DagsterInstance, since: datetime) -> Iterator[dg.RunRecord]:
    """Runs that a user ended, and that were changed after ``since``."""
    canceled = dg.RunsFilter(statuses=[_Status.CANCELED], updated_after=since)
    interrupted = dg.RunsFilter(statuses=[_Status.FAILURE], updated_after=since, tags={INTERRUPTED_TAG: "true"})
    return chain(instance.get_run_records(canceled), instance.get_run_records(interrupted))


def _ended_at(record: dg.RunRecord) -> float:
    """A run that was cancelled in the queue has no end time."""
    return record.end_time or record.update_timestamp.timestamp()


def _ranges_of(run: dg.DagsterRun) -> Iterator[tuple[str, int, int]]:
    """The series of ``run`` by name, each with the range of its partitions, epoch seconds. Assets of other programs, and series
    whose partitions are not those of today's grid, are left out."""
    one = run.tags.get(PARTITION_TAG, "")
    first, last = run.tags.get(RANGE_START_TAG, one), run.tags.get(RANGE_END_TAG, one)
    for key in run.asset_selection or ():
        if len(key.path) != 2 or key.path[0] != ASSET_ROOT:
            continue
        name = key.path[1]
        try:
            timeframe = parse_timeframe(name.rpartition("_")[2])
            windows = [partition_from_key(timeframe, each).window for each in (first, last)]
        except InputError:
            continue
        yield name, windows[0].start_s, windows[1].end_s
