"""Decides which runs a tick of the gap sensor requests: inner gaps of held series, the newest first, a few requests at a time.

A tick looks at as many series as its time allows and requests at most KTRDR_AUTO_REQUESTS requests; the next one waits until
those runs have ended. What brings nothing is requested again after growing pauses, a bar that IB neither sends nor confirms as
absent too. What a gap is: `inner_gaps.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import Mode
from ktrdr_pipelines.domain.partitions import Partition, partition_at, partitions_in
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.automation.cancelled import CancelledRanges
from ktrdr_pipelines.orchestration.automation.due import QUIET_S
from ktrdr_pipelines.orchestration.automation.gap_sweep import Sweep, choose
from ktrdr_pipelines.orchestration.automation.inner_gaps import InnerGaps, find_inner_gaps
from ktrdr_pipelines.orchestration.automation.request_cost import command_for
from ktrdr_pipelines.orchestration.automation.run_requests import MAX_PARTITIONS, request_run
from ktrdr_pipelines.orchestration.runs.queries import ActiveRuns
from ktrdr_pipelines.orchestration.runs.tags import Origin
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.atomic import state_of
from ktrdr_pipelines.store.store import Store

GAP_INTERVAL_S = 600
"""Seconds between two ticks: KTRDR_AUTO_REQUESTS requests take as long by IB's rules."""

TICK_BUDGET_S = 25.0
"""After this a tick looks at no further series, and the next one begins with them; Dagster's time-out is 60 s."""

MAX_RUNS = 10
"""Runs in one tick: each takes the daemon about a second (docs/dagster_facts.md, 4)."""

MAX_IDLE = 100
"""Partitions without a gap between two requests of one run: each is an event of 10 ms, a further run costs five seconds."""

_LOCK_TIMEOUT_S = 2.0
_SHOWN = 3


@dataclass
class GapTick:
    """What one tick decided. ``sweeps`` by series name; ``continue_at`` as in `tail.TailTick`."""

    requests: list[dg.RunRequest] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    continue_at: str = ""


@dataclass(frozen=True)
class GapState:
    """What the last tick left; the content of the cursor."""

    sweeps: Mapping[str, Sweep] = field(default_factory=dict)
    continue_at: str = ""

    @classmethod
    def from_cursor(cls, cursor: str | None) -> GapState:
        """Nothing if the cursor is not ours."""
        try:
            found = json.loads(cursor or "{}")
            sweeps = {str(name): Sweep(*map(int, values)) for name, values in found["sweeps"].items()}
            return cls(sweeps, str(found["continue_at"]))
        except (ValueError, TypeError, KeyError, AttributeError):
            return cls()


def write_cursor(tick: GapTick) -> str:
    """What ``tick`` leaves to the next one."""
    sweeps = {name: list(astuple(sweep)) for name, sweep in sorted(tick.sweeps.items())}
    return json.dumps({"sweeps": sweeps, "continue_at": tick.continue_at})


class GapFiller:
    """Looks at series after series, as many as fit into a tick, and remembers their gaps until files or records change."""

    def __init__(self, settings: Settings, universe: Sequence[Series]) -> None:
        self._settings = settings
        self._universe = sorted(universe, key=lambda s: s.name)
        self._known: dict[str, tuple[object, InnerGaps]] = {}

    def run_tick(
        self,
        instance: dg.DagsterInstance,
        active: ActiveRuns,
        cancelled: CancelledRanges,
        state: GapState,
        now: datetime,
        *,
        corrections: object = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> GapTick:
        """The runs for the newest gaps. ``corrections`` changes whenever calendars do."""
        tick = GapTick(sweeps=dict(state.sweeps))
        until = clock() + TICK_BUDGET_S
        order = [*(s for s in self._universe if s.name >= state.continue_at)]
        order += [s for s in self._universe if s.name < state.continue_at]
        records = _read_records(instance, order)
        for n, series in enumerate(order):
            if n and clock() > until:
                tick.continue_at = series.name
                break
            record = records.get(asset_key(series))
            if active.find(series) or _is_being_written(self._store(), series, now):
                continue
            try:
                self._look(series, instance, record, cancelled, corrections, now, tick)
            except KtrdrError as error:
                self._known.pop(series.name, None)
                tick.problems.append(f"{series}: {error}")
        self._decide(active, now, tick)
        self._explain(tick)
        return tick

    def _store(self) -> Store:
        # A new store, because a store caches every sidecar it reads.
        return Store(self._settings.data_dir, lock_timeout_s=_LOCK_TIMEOUT_S)

    def _look(
        self,
        series: Series,
        instance: dg.DagsterInstance,
        record: object,
        cancelled: CancelledRanges,
        corrections: object,
        now: datetime,
        tick: GapTick,
    ) -> None:
        """Find the gaps of ``series`` unless nothing changed since they were found."""
        store, stopped = self._store(), cancelled.find(series.name)
        mark = (_files(store, series), record, corrections, tuple(stopped))
        known = self._known.get(series.name)
        if known is not None and known[0] == mark:
            return
        if mark[0] == (None, None) and record is None:
            self._known.pop(series.name, None)
            return
        try:
            tick.notices += [f"{series}: {text}" for text in store.prepare(series, now=now).describe()]
        except KtrdrError as error:  # its recorded partitions are requested, and fail with this reason
            tick.problems.append(f"{series}: {error}")
        recorded = instance.get_materialized_partitions(asset_key(series)) if record is not None else ()
        gaps = find_inner_gaps(series, store, sorted(recorded), self._settings, now, stopped)
        self._known[series.name] = ((_files(store, series), *mark[1:]), gaps)
        if not len(gaps.bars):
            tick.sweeps.pop(series.name, None)

    def _decide(self, active: ActiveRuns, now: datetime, tick: GapTick) -> None:
        """Request the newest gaps, as far as the bound of a tick allows."""
        if running := active.find_origin(Origin.GAP_FILL):
            tick.reasons.append(f"the last gaps are still being loaded ({running})")
            return
        now_s = int(now.timestamp())
        open_gaps = [gaps for _, gaps in self._known.values() if len(gaps.bars) and not active.find(gaps.series)]
        left, later = self._settings.auto_requests, []
        wanted: dict[_Run, list[Series]] = {}
        for gaps in sorted(open_gaps, key=lambda g: int(g.bars.opens[-1]), reverse=True):
            name = gaps.series.name
            chosen = choose(gaps, tick.sweeps.get(name), now_s)
            if wait_until_s := chosen.wait_until_s(now_s):
                later.append(wait_until_s)
                continue
            if left <= 0 or len(wanted) >= MAX_RUNS:
                continue
            windows = gaps.plan_newest(chosen.low, chosen.high, self._settings.history_limits, left)
            runs = _gather(gaps, windows)[: MAX_RUNS - len(wanted)]
            for run in runs:
                wanted.setdefault(run, []).append(gaps.series)
            left -= sum(run.requests for run in runs)
            until_s = int(gaps.bars.opens[gaps.below(runs[-1].window.start_s)])
            tick.sweeps[name] = chosen.note_request(gaps, until_s, now_s)
        tick.requests = [request for run, series in wanted.items() for request in _request(run, series, now_s)]
        if later and not wanted:
            tick.reasons.append(
                f"{len(later)} series have gaps whose last requests brought nothing, the next one is at "
                f"{format_instant(datetime.fromtimestamp(min(later), UTC))}"
            )

    def _explain(self, tick: GapTick) -> None:
        """Why gaps are not requested."""
        found = [gaps for _, gaps in self._known.values()]
        too_long = [(gaps.series, window, cost) for gaps in found for window, cost in gaps.too_long]
        for series, window, cost in sorted(too_long, key=lambda each: each[1].start, reverse=True)[:_SHOWN]:
            tick.reasons.append(
                f"{series} has no bars in {window}, which is {cost}, more than KTRDR_AUTO_REQUESTS allows: load them with "
                f"`{command_for(series, Mode.FULL, window)}`"
            )
        if len(too_long) > _SHOWN:
            tick.reasons.append(f"{len(too_long) - _SHOWN} more gaps are as long")
        if stopped := [str(gaps.series) for gaps in found if gaps.cancelled]:
            tick.reasons.append(f"gaps whose load was cancelled: {', '.join(sorted(stopped)[:_SHOWN])}")
        if tick.continue_at:
            tick.reasons.append(f"the time of a tick is up; the next one begins with {tick.continue_at}")
        if not tick.reasons and not tick.requests:
            tick.reasons.append("no gaps in what is held")


# -- runs -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
    """``requests`` requests for the gaps in ``window``, in the partitions from ``first`` to ``last``."""

    timeframe: str
    first: Partition
    last: Partition
    window: Window
    requests: int

    def count_partitions(self, timeframe: Timeframe) -> int:
        """How many partitions the run has."""
        return _count_partitions(timeframe, self.first.window.start, self.last.window.end)


def _count_partitions(timeframe: Timeframe, start: datetime, end: datetime) -> int:
    return len(list(partitions_in(timeframe, Window(start, end)))) if start < end else 0


def _gather(gaps: InnerGaps, windows: Sequence[Window]) -> list[_Run]:
    """As few runs as possible for ``windows`` (newest first): windows of one segment with few partitions between them."""
    runs: list[_Run] = []
    segment, timeframe = -1, gaps.series.timeframe
    for window in windows:
        found = _run_of(gaps, window, 1)
        at = gaps.below(found.window.start_s)
        mine = next(n for n, (begin, end) in enumerate(gaps.segments) if begin <= at < end)
        if runs and mine == segment:
            joined = _run_of(gaps, Window(window.start, runs[-1].window.end), runs[-1].requests + 1)
            idle = _count_partitions(timeframe, found.last.window.end, runs[-1].first.window.start)
            if idle <= MAX_IDLE and joined.count_partitions(timeframe) <= MAX_PARTITIONS:
                runs[-1] = joined
                continue
        runs.append(found)
        segment = mine
    return runs


def _run_of(gaps: InnerGaps, window: Window, requests: int) -> _Run:
    timeframe, opens = gaps.series.timeframe, gaps.bars.opens
    first_s, last_s = int(opens[gaps.below(window.start_s)]), int(opens[gaps.below(window.end_s) - 1])
    first, last = (partition_at(timeframe, datetime.fromtimestamp(at_s, UTC)) for at_s in (first_s, last_s))
    return _Run(timeframe.name, first, last, window, requests)


def _request(run: _Run, series: Sequence[Series], now_s: int) -> list[dg.RunRequest]:
    """The run for all ``series`` that miss the same window, divided if it would be too large."""
    most = max(1, MAX_PARTITIONS // run.count_partitions(series[0].timeframe))
    key = f"gap:{run.timeframe}:{run.window.start_s}:{run.window.end_s}:{now_s // GAP_INTERVAL_S}"
    return [
        request_run(
            series[at : at + most], run.first, run.last, Mode.FULL,
            origin=Origin.GAP_FILL, run_key=key, start=run.window.start, end=run.window.end,
        )
        for at in range(0, len(series), most)
    ]  # fmt: skip


# -- files and records ------------------------------------------------------------------------------------------------------


def _files(store: Store, series: Series) -> tuple[object, object]:
    return state_of(store.csv_path(series)), state_of(store.sidecar_path(series))


def _is_being_written(store: Store, series: Series, now: datetime) -> bool:
    """True if the file changed a moment ago: perhaps another program is still writing."""
    state = state_of(store.csv_path(series))
    return state is not None and 0 <= now.timestamp() - state.mtime_ns / 1e9 < QUIET_S


def _read_records(instance: dg.DagsterInstance, universe: Sequence[Series]) -> dict[dg.AssetKey, object]:
    """By asset a value that changes with every materialization; assets without one are left out."""
    records = instance.get_asset_records([asset_key(s) for s in universe]) if universe else ()
    found = {r.asset_entry.asset_key: r.asset_entry.last_materialization_storage_id for r in records}
    return {key: value for key, value in found.items() if value is not None}
