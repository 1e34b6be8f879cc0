"""The fault matrix: every fault in every mode and timeframe, and the file after it. Used by tests and by `tools/matrix.py`.

A cell is two runs of the same load through everything that is real (planner, pacing ledger, ib_insync, a socket, files)
against a simulated gateway: the first with a fault, the second without. The expected file is computed from the simulator's
market alone. Time is moved, not waited for: `Fault.sleep_scale` is the cost of a second of the loader's sleep.
"""

from __future__ import annotations

import csv
import itertools
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np

from ktrdr_pipelines.domain.calls import Waiting
from ktrdr_pipelines.domain.instruments import Series, forex, stock
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.ib.history import GatewayAddress, IBHistory
from ktrdr_pipelines.ib.pacing.clock import Reading
from ktrdr_pipelines.loading.report import LoadReport
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.planning.modes import Held, resolve_window
from ktrdr_pipelines.simulator.faults import Asked, FaultRule
from ktrdr_pipelines.simulator.habits import USUAL, Habits
from ktrdr_pipelines.simulator.market import BAR_SIZES, DAY_S, ContractQuery, find_listings, label_dates
from ktrdr_pipelines.simulator.request_reach import DurationRule
from ktrdr_pipelines.simulator.server import GatewayThread, run_in_thread
from ktrdr_pipelines.simulator.synthetic import SyntheticMarket
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import TIMEOUTS, run_load

MARKET = SyntheticMarket()

Rows = dict[int, tuple[float, ...]]
"""By stamp: open, high, low, close, volume."""


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


FIRST_RUN, SECOND_RUN = utc("2024-06-14T19:20:30"), utc("2024-06-17T19:20:30")
"""A Friday in the middle of the session, and the Monday after it."""

# -- faults -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """``rules`` apply in the first run; ``habits`` and ``durations`` of the gateway in both. ``seconds`` in rules are real ones
    at tempo 1. ``timeout_s``: the loader's time-out of one request, real seconds. ``sleep_scale``: real seconds that one
    second of the loader's sleep takes, where the fault ends by itself. ``modes``: those in which it has an effect."""

    name: str
    rules: tuple[FaultRule, ...] = ()
    habits: Habits = USUAL
    durations: DurationRule = DurationRule.SESSIONS
    timeout_s: float = 20.0
    sleep_scale: float = 0.0
    modes: tuple[Mode, ...] = tuple(Mode)
    may_fail_again: bool = False


SECOND = (2,)
ALL_TRIES = (2, 3, 4, 5)
FROM_SECOND = tuple(range(2, 200))
QUICK = 0.15
"""Time-out of a request that is never answered, real seconds."""
SLOWLY = 0.01


def _error(code: int, text: str, nth: tuple[int, ...] = SECOND) -> tuple[FaultRule, ...]:
    return (FaultRule("error", code=code, text=text, nth=nth),)


def _one(kind: str, nth: tuple[int, ...] = SECOND, **amounts: object) -> tuple[FaultRule, ...]:
    return (FaultRule(kind, nth=nth, **amounts),)  # type: ignore[arg-type]


def _asks_for_newest(asked: Asked) -> bool:
    return asked.end >= ("20240613" if asked.bar_size == "1 day" else "20240614")


_162 = "Historical Market Data Service error message:"

FAULTS: tuple[Fault, ...] = (
    # -- no answer
    Fault("pacing once", _one("pacing")),
    Fault("pacing to the end", _one("pacing", FROM_SECOND)),
    Fault("silent once", _one("silent"), timeout_s=QUICK),
    Fault("silent, all tries", _one("silent", ALL_TRIES), timeout_s=QUICK),
    Fault("answer after the time-out", _one("late"), timeout_s=QUICK),
    Fault("slow", _one("slow", seconds=0.1), timeout_s=0.3),
    Fault("drop before the answer", _one("drop_after", after_bytes=0)),
    Fault("drop after 200 bytes", _one("drop_after", after_bytes=200)),
    Fault("drop, all tries", _one("drop_after", ALL_TRIES, after_bytes=3000)),
    Fault("165, then the answer", _one("query_notice")),
    Fault("165, then silence", (*_one("query_notice"), *_one("silent")), timeout_s=QUICK),
    Fault("366 in place of the answer", _one("unknown_query")),
    Fault("query cancelled", _one("query_cancelled")),
    Fault("unknown 162", _error(162, f"{_162}Dienst nicht verfügbar")),
    Fault("unknown 162, all tries", _error(162, f"{_162}Dienst nicht verfügbar", ALL_TRIES)),
    Fault("session elsewhere", _error(162, f"{_162}Trading TWS session is connected from a different IP address")),
    Fault("no permission", _error(354, "Requested market data is not subscribed.")),
    # -- false answers
    Fault("first half", _one("partial")),
    Fault("last half", _one("partial", part="last")),
    Fault("gap of seven", _one("gap", rows=7)),
    Fault("newest 40 only", _one("newest", rows=40)),
    # -- false in the same way in every answer
    Fault("always the first half", _one("partial", ())),
    Fault("always the last half", _one("partial", (), part="last")),
    Fault("always a gap of seven", _one("gap", (), rows=7)),
    Fault("always the newest 40", _one("newest", (), rows=40)),
    Fault("always the oldest 40", _one("oldest", (), rows=40)),
    Fault("always without the first bar", _one("without_first", ())),
    Fault("always without the last bar", _one("without_last", ())),
    Fault("no bars, no error", _one("empty")),
    Fault("no bars to the end, no error", _one("empty", FROM_SECOND)),
    Fault("false no data", _one("no_data_lie")),
    Fault("duplicates out of order", (*_one("duplicate", rows=5), *_one("out_of_order", rows=9))),
    Fault("conflict", _one("conflict")),
    Fault("NaN", _one("nan")),
    Fault("infinite", _one("infinite")),
    Fault("high below low", _one("high_below_low")),
    Fault("newest bars late", (FaultRule("lag", seconds=600),)),
    Fault("newest bar revised later", (FaultRule("revise", factor=1.001, when=_asks_for_newest),), modes=(Mode.TAIL,)),
    Fault("head timestamp refused", (FaultRule("error", on="head"), *_one("partial", part="last"))),
    Fault("head timestamp silent", (FaultRule("silent", on="head"), *_one("partial", part="last")), timeout_s=QUICK),
    # -- the gateway as a whole
    Fault("restart", _one("restart", seconds=0.1), sleep_scale=SLOWLY),
    Fault("hang", _one("hang", seconds=0.2), timeout_s=QUICK, sleep_scale=SLOWLY),
    Fault("1100, 1102, answers delayed", _one("link_down", seconds=0.1), timeout_s=0.3, sleep_scale=SLOWLY),
    Fault(
        "1100, 1101, answers lost",
        _one("link_down", seconds=0.1, back=1101, meanwhile="lost"),
        timeout_s=0.3,
        sleep_scale=SLOWLY,
    ),
    Fault(
        "2105, 2106, answers lost", _one("farm_down", seconds=0.1, meanwhile="lost"), timeout_s=0.3, sleep_scale=SLOWLY
    ),
    Fault(
        "2105, 2107, no bars meanwhile",
        _one("farm_down", seconds=0.1, back=2107, meanwhile="empty"),
        sleep_scale=SLOWLY,
    ),
    Fault("326 twice", (FaultRule("client_id_in_use", on="connect", times=2),)),
    Fault("clock ten minutes slow", (FaultRule("stale_clock", on="connect", seconds=600),)),
    Fault("clock a day slow", (FaultRule("stale_clock", on="connect", seconds=DAY_S),)),
    Fault("clock ten minutes fast", (FaultRule("stale_clock", on="connect", seconds=-600),)),
)

HABITS: tuple[Fault, ...] = (
    Fault("durations strict", durations=DurationRule.STRICT),
    Fault("durations by the calendar", durations=DurationRule.CALENDAR),
    Fault("days dated by their open", habits=Habits(days="open")),
    Fault("newest 100 bars an answer", habits=Habits(newest=100)),
    Fault("newest 5 bars an answer", habits=Habits(newest=5), may_fail_again=True),
    Fault("head timestamp early", habits=Habits(head="early")),
    Fault("head timestamp late", habits=Habits(head="late")),
    Fault("head timestamp none", habits=Habits(head="none")),
    Fault("empty without an error", habits=Habits(empty="no_bars")),
)
"""Differences between gateways that are no faults."""

OLD_ENDS = ("head timestamp", "empty without an error", "false no data", "no bars, no error", "restart")
"""Faults and habits, by the begin of their names, that have an effect where history starts."""

PERIODS: tuple[Fault, ...] = (
    Fault("dated with the last session"),
    Fault("dated with the first day", habits=Habits(periods="first")),
    Fault("first day, durations by the calendar", habits=Habits(periods="first"), durations=DurationRule.CALENDAR),
)
"""For weeks and months."""


# -- where ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A series and the span that is to be loaded; ``held`` by mode: what is in the file before, as fractions of the span."""

    series: Series
    start: datetime

    @property
    def name(self) -> str:
        return str(self.series)

    def held(self, mode: Mode) -> list[Window]:
        length = FIRST_RUN - self.start

        def piece(first: float, last: float) -> Window:
            ends = (self.start + first * length, self.start + last * length)
            return Window(*(end.replace(minute=0, second=0, microsecond=0) for end in ends))

        pieces = {
            Mode.TAIL: [piece(0, 0.2)],
            Mode.BACKFILL: [piece(0.85, 0.95)],
            Mode.FULL: [piece(0.1, 0.2), piece(0.6, 0.65)],
        }
        return pieces[mode]


LISTED_LATE = {"1d": utc("2019-06-01"), "1h": utc("2020-11-01")}
"""Spans of Roblox that begin before its listing of March 2021."""

_STARTS = {"1m": "2024-06-11", "1h": "2024-03-24", "1d": "2021-03-14", "1w": "2020-06-01", "1mo": "2020-06-01"}


@cache
def place(symbol: str, timeframe: str) -> Place:
    instrument = forex(symbol) if len(symbol) == 6 else stock(symbol)
    return Place(Series(instrument, TIMEFRAMES[timeframe]), utc(_STARTS[timeframe]))


def before_its_listing(timeframe: str) -> Place:
    """A place whose old end is empty: loads there meet the head timestamp and answers without bars."""
    return Place(Series(stock("RBLX"), TIMEFRAMES[timeframe]), LISTED_LATE[timeframe])


# -- the truth --------------------------------------------------------------------------------------------------------


@cache
def find_truth(series: Series, start: datetime, now: datetime, habits: Habits = USUAL) -> Rows:
    """Every bar from ``start`` that is complete at ``now``, as the market has it, without the project's calendar, planner and
    parser."""
    instrument, now_s = series.instrument, int(now.timestamp())
    symbol, sec_type = (instrument.symbol[:3], "CASH") if instrument.sec_type == "CASH" else (instrument.symbol, "STK")
    (listing,) = find_listings(MARKET, ContractQuery(symbol=symbol, sec_type=sec_type, currency="USD"), now_s)
    size, sessions = BAR_SIZES[series.timeframe.ib_bar_size], MARKET.sessions(listing)
    regular, what = instrument.use_rth, instrument.what_to_show
    from_s, to_s = int(start.timestamp()) - 40 * DAY_S * size.is_dated, now_s + 40 * DAY_S
    bars = MARKET.bars(listing, size, from_s, to_s, what=what, regular=regular)
    closes = sessions.closes(regular=regular)
    if size.is_dated:
        keys = label_dates(sessions.day, size.unit)
        ends = closes[np.searchsorted(keys, label_dates(bars.stamp // DAY_S, size.unit), side="right") - 1]
    else:
        opens = sessions.opens(regular=regular)
        ends = np.minimum(bars.stamp + size.seconds, closes[np.searchsorted(opens, bars.stamp, side="right") - 1])
    bars = habits.date_bars(bars.take(ends <= now_s), size, sessions)
    volume = np.maximum(bars.volume, 0).tolist()
    columns = (bars.open.tolist(), bars.high.tolist(), bars.low.tolist(), bars.close.tolist(), volume)
    rows = zip(bars.stamp.tolist(), *columns, strict=True)
    return {stamp: tuple(map(float, row)) for stamp, *row in rows if stamp >= start.timestamp()}


def read_rows(path: Path) -> list[tuple[int, tuple[float, ...]]]:
    """The rows of a CSV, read with the standard library."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    return [(int(utc(line[0].removesuffix("Z")).timestamp()), tuple(map(float, line[1:]))) for line in lines[1:]]


@dataclass(frozen=True)
class Verdict:
    """A file against the truth: stamps that are not there, bars that were not requested or do not exist, bars with other values;
    ``doubled`` counts stamps that are not increasing."""

    lost: list[int]
    invented: list[int]
    wrong: list[int]
    doubled: int

    @property
    def is_exact(self) -> bool:
        return not (self.lost or self.invented or self.wrong or self.doubled)


def judge(path: Path, truth: Rows) -> Verdict:
    rows = read_rows(path)
    stamps = [stamp for stamp, _ in rows]
    found = dict(rows)
    return Verdict(
        lost=[s for s in truth if s not in found],
        invented=[s for s in found if s not in truth],
        wrong=[s for s in found if s in truth and found[s] != truth[s]],
        doubled=sum(b <= a for a, b in itertools.pairwise(stamps)),
    )


# -- running ----------------------------------------------------------------------------------------------------------


class Clock:
    """The machine's time plus what the loader has slept; a second of its sleep takes ``scale`` real seconds."""

    def __init__(self, scale: float = 0.0) -> None:
        self.slept_s = 0.0
        self.scale = scale

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        if self.scale:
            time.sleep(seconds * self.scale)

    def now_s(self) -> float:
        return time.time() + self.slept_s

    def read(self) -> Reading:
        return Reading(self.now_s(), time.monotonic() + self.slept_s, "test")


@dataclass
class Run:
    """One load: its report, its file against the truth, the requests that the gateway saw, the waits that were reported."""

    report: LoadReport
    verdict: Verdict
    window: Window
    requests: int
    violations: list[tuple[float, str]]
    waits: list[Waiting] = field(default_factory=list)
    false_absences: int = 0
    """Bars that exist and are recorded as absent."""
    false_completions: list[str] = field(default_factory=list)
    """Partitions reported as complete in which a bar is missing."""

    @property
    def summary(self) -> str:
        """The report in one line, for users."""
        if self.report.failures:
            return str(self.report.failures[0].error)
        late = [notice for notice in self.report.notices if "not there yet" in notice]
        retries = f"{self.report.retries} retries" if self.report.retries else ""
        return "; ".join(filter(None, [*late, retries, *self.report.notices[:1]][:2])) or "nothing"


class Bench:
    """One data folder, one pacing ledger and one clock; every run has a gateway of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "data")
        self.clock = Clock()

    def load(
        self, gateway: GatewayThread, place: Place, window: Window, *, now: datetime, timeout_s: float = 20.0,
        recheck_last: bool = False,
    ) -> tuple[LoadReport, list[Waiting]]:  # fmt: skip
        address = GatewayAddress(
            "127.0.0.1", gateway.port, state_dir=self.folder, library="ib_insync", probe_timeout_s=timeout_s,
            **{**TIMEOUTS, "request_timeout_s": timeout_s, "connect_timeout_s": min(5.0, 10 * timeout_s)},
        )  # fmt: skip
        waits: list[Waiting] = []
        history = IBHistory(address, waits.append, self.clock.sleep, now=lambda: now, clock=self.clock)
        with history:
            job = Load(
                place.series,
                window,
                store=self.store,
                history=lambda: history,
                limits=HistoryLimits.CLASSIC,
                now=lambda: now,
                recheck_last=recheck_last,
            )
            list(run_load(job))
        return job.report, waits

    def run(self, place: Place, mode: Mode, fault: Fault, *, now: datetime, tempo: float, spoilt: bool) -> Run:
        """The load that a user starts with ``mode``, and its results."""
        series, store = place.series, self.store
        held = Held.of(store.extent(series), store.read_sidecar(series))
        start = None if mode is Mode.TAIL else place.start
        request = LoadRequest(series.instrument.symbol, series.timeframe, mode, start)
        window = resolve_window(request, held, until=now)
        self.clock.scale = fault.sleep_scale if spoilt else 0.0
        rules = tuple(_at_tempo(rule, tempo) for rule in fault.rules) if spoilt else ()
        with ExitStack() as stack:
            gateway = stack.enter_context(
                run_in_thread(
                    MARKET,
                    faults=rules,
                    clock=now.timestamp,
                    pace_clock=self.clock.now_s,
                    habits=fault.habits,
                    durations=fault.durations,
                    latency_s=0.0 if tempo == 1 or not spoilt else 0.005 * tempo,
                )
            )
            report, waits = self.load(
                gateway,
                place,
                window,
                now=now,
                timeout_s=fault.timeout_s if spoilt else 20.0,
                recheck_last=mode is Mode.TAIL and held is not None,
            )
            asked = [r for r in gateway.requests if r.kind != "cancel"]
            violations = gateway.violations
        until = FIRST_RUN if mode is Mode.BACKFILL else now
        truth = find_truth(series, place.start, until, fault.habits)
        if mode is Mode.BACKFILL:  # a backfill loads nothing newer than what was held
            newest = max(stamp for stamp, _ in read_rows(store.csv_path(series)))
            truth = {stamp: row for stamp, row in truth.items() if stamp <= newest}
        run = Run(report, judge(store.csv_path(series), truth), window, len(asked), violations, waits)
        lost = run.verdict.lost
        absent = store.read_sidecar(series).proven_empty
        run.false_absences = sum(a.start.timestamp() <= s < a.end.timestamp() for a in absent for s in lost)
        spans = {key: done.partition.window for key, done in report.completed.items()}
        run.false_completions = [k for k, w in spans.items() if any(w.start_s <= s < w.end_s for s in lost)]
        return run


def _at_tempo(rule: FaultRule, tempo: float) -> FaultRule:
    return replace(rule, seconds=rule.seconds * tempo) if rule.kind in _TIMED else rule


_TIMED = ("slow", "restart", "hang", "link_down", "farm_down")

_prepared: dict[tuple[object, ...], Path] = {}


def prepare(scratch: Path, place: Place, mode: Mode, fault: Fault) -> Path:
    """A data folder with the bars held before the cell, loaded from a gateway without faults; made once."""
    habits = replace(fault.habits, newest=0)
    key = (scratch, place, mode, habits, fault.durations)
    if key not in _prepared:
        folder = scratch / f"held{len(_prepared)}"
        bench = Bench(folder)
        with run_in_thread(
            MARKET, clock=FIRST_RUN.timestamp, judge=False, habits=habits, durations=fault.durations
        ) as gateway:
            for window in place.held(mode):
                report, _ = bench.load(gateway, place, window, now=FIRST_RUN)
                assert not report.failures, report.failures
        _prepared[key] = folder
    return _prepared[key]


@dataclass(frozen=True)
class Cell:
    """One field of the matrix."""

    fault: Fault
    mode: Mode
    place: Place

    @property
    def name(self) -> str:
        return f"{self.fault.name} | {self.mode} | {self.place.name}"

    def play(self, scratch: Path, folder: Path, *, tempo: float = 1.0) -> tuple[Run, Run]:
        """Both runs. ``scratch`` is shared by all cells, ``folder`` is this cell's. At ``tempo`` 10 the gateway is ten times
        slower, at 0.1 ten times faster."""
        held = prepare(scratch, self.place, self.mode, self.fault)
        shutil.copytree(held / "data", folder / "data")
        bench = Bench(folder)
        first = bench.run(self.place, self.mode, self.fault, now=FIRST_RUN, tempo=tempo, spoilt=True)
        bench.clock.slept_s += 1800  # so that pauses of the first run are over
        second = bench.run(self.place, self.mode, self.fault, now=SECOND_RUN, tempo=tempo, spoilt=False)
        return first, second


PLACES: dict[tuple[Mode, str], Place] = {
    (mode, timeframe): place("EURUSD" if (m + t) % 2 else "AAPL", timeframe)
    for m, mode in enumerate(Mode)
    for t, timeframe in enumerate(("1m", "1h", "1d"))
}
"""Stock and currency pair alternate."""


def pick_cells() -> list[Cell]:
    """The part of the matrix that the tests run: every fault in every mode and at every timeframe, once each."""
    modes, timeframes = list(Mode), ("1m", "1h", "1d")
    cells = []
    for n, fault in enumerate((*FAULTS, *HABITS)):
        places = [PLACES[mode, timeframes[(m + n) % 3]] for m, mode in enumerate(modes)]
        mine = [Cell(fault, mode, where) for mode, where in zip(modes, places, strict=True) if mode in fault.modes]
        cells += mine[-1:] if fault.may_fail_again else mine  # many requests
    cells += [cell for cell in list_cells() if cell.fault in PERIODS and cell.mode is Mode.FULL]
    return cells + [cell for cell in list_cells() if cell.place == before_its_listing("1d") and cell.mode is Mode.FULL]


def list_cells() -> list[Cell]:
    """The whole matrix."""
    cells = [Cell(f, mode, where) for f in (*FAULTS, *HABITS) for (mode, _), where in PLACES.items() if mode in f.modes]
    cells += [
        Cell(fault, mode, before_its_listing(timeframe))
        for fault in (*FAULTS, *HABITS)
        if fault.name.startswith(OLD_ENDS)
        for mode in (Mode.BACKFILL, Mode.FULL)
        for timeframe in LISTED_LATE
    ]
    cells += [
        Cell(habit, mode, place(symbol, timeframe))
        for habit in PERIODS
        for mode in Mode
        for symbol, timeframe in (("AAPL", "1w"), ("EURUSD", "1mo"))
    ]
    return cells


def check(cell: Cell, first: Run, second: Run) -> None:
    """The promise of every cell.

    Raises:
        AssertionError: a bar is wrong, lost without a report, or still lost after the run without the fault.
    """
    series = str(cell.place.series)
    for run in (first, second):
        is_revised = cell.fault.name == "newest bar revised later" and run is first
        assert not run.verdict.invented, f"invented {show(run.verdict.invented)}"
        assert not run.verdict.wrong or is_revised, f"wrong {show(run.verdict.wrong)}"
        assert not run.verdict.doubled
        assert not run.false_absences, f"{run.false_absences} existing bars are recorded as absent"
        assert not run.false_completions, f"reported as complete, but bars are missing: {run.false_completions}"
        assert not run.violations, run.violations
        lost = [s for s in run.verdict.lost if run.window.start_s <= s < run.window.end_s]
        if lost:
            assert run.report.missing_bars >= len(lost), (
                f"{len(lost)} lost, {run.report.missing_bars} reported as missing"
            )
            is_late = any("not there yet" in notice for notice in run.report.notices)
            assert run.report.failures or is_late, f"lost without a report: {show(lost)}"
        if run.report.failures:
            assert run.report.status in ("partial", "failed")
            for failure in run.report.failures:
                assert series in str(failure.error)
                assert str(failure.window.start.year) in str(failure.error)
    if cell.fault.may_fail_again and second.report.failures:
        return
    assert not second.report.failures, second.summary
    assert second.verdict.is_exact, (
        f"after the second run lost {show(second.verdict.lost)}, wrong {second.verdict.wrong[:3]}"
    )


def show(stamps: list[int]) -> str:
    """How many, the first and the last."""
    if not stamps:
        return "none"
    ends = [f"{datetime.fromtimestamp(s, UTC):%Y-%m-%dT%H:%M}" for s in (stamps[0], stamps[-1])]
    return f"{len(stamps)} ({' to '.join(ends)})"
