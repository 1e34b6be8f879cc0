"""Where IB's history of series begins (head timestamps) and ends, and what is held."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Instrument, Series, file_symbol
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.domain.timeframes import Timeframe, parse_timeframe
from ktrdr_pipelines.errors import GatewayUnreachable, InputError, KtrdrError, PacingError
from ktrdr_pipelines.ib.discovery import discover, known_to_account
from ktrdr_pipelines.ib.history import IBHistory, describe_head
from ktrdr_pipelines.ib.pacing import rules as pacing
from ktrdr_pipelines.ib.pacing.ledger import Grant, WaitCancelled
from ktrdr_pipelines.services.gateway.question import QUICK_S, Problem, quick_address
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.schedule_overrides import open_store
from ktrdr_pipelines.store.snapshot import peek
from ktrdr_pipelines.universe.file import universe_of

RANGES_AT_ONCE = 20
"""Most instruments in one query: each may cost one of the 60 requests in ten minutes."""
RANGES_PATIENCE_S = 30.0
PACING_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class DataRange:
    """What IB has of one series, and what is held. Times are bar opens, both ends included.

    ``earliest`` is IB's head timestamp: a hint, sometimes too early or too late. None without ``problem``: IB has none.
    """

    symbol: str
    timeframe: str
    earliest: datetime | None
    latest: datetime | None
    """The last complete bar, by the calendar."""
    held_first: datetime | None = None
    held_last: datetime | None = None
    problem: Problem | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; times in ISO 8601 UTC."""
        return {
            "symbol": self.symbol,
            "timeframe": self.timeframe,
            "earliest": _text(self.earliest),
            "latest": _text(self.latest),
            "held": {"first": _text(self.held_first), "last": _text(self.held_last)},
            "problem": asdict(self.problem) if self.problem else None,
        }


@dataclass(frozen=True, slots=True)
class DataRanges:
    """The result of ``ib ranges``."""

    asked_at: datetime
    ranges: tuple[DataRange, ...]
    requests_made: int = 0

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "asked_at": format_instant(self.asked_at),
            "ranges": [each.as_dict() for each in self.ranges],
            "ib_requests_made": self.requests_made,
        }


def data_ranges(
    settings: Settings, symbols: Sequence[str] | None = None, timeframes: Sequence[str] | None = None
) -> DataRanges:
    """The ranges of ``symbols`` at ``timeframes``. Default: the symbols of the universe, at the timeframes listed there (1d for
    a symbol that is not in it).

    A head timestamp is remembered for a while (`ib.symbol_cache.HEAD_KEPT`). Each other one is a history request and counts; if
    its pacing wait is long, it is not waited for and reported as a problem of the series.

    Raises:
        InputError: invalid symbol or timeframe, or more than `RANGES_AT_ONCE` instruments.
    """
    wanted = _choose_series(settings, symbols, timeframes)
    now = datetime.now(UTC)
    store = open_store(settings.data_dir)
    found: list[DataRange] = []
    deadline = time.monotonic() + RANGES_PATIENCE_S
    gone: Problem | None = None
    with IBHistory(quick_address(settings)) as history:
        for symbol, (instrument, names) in wanted.items():
            pinned, head, problem = instrument, None, gone
            if time.monotonic() > deadline:
                problem = problem or Problem(
                    "timeout", "not requested: the other symbols took too long", "Name fewer symbols."
                )
            if problem is None:
                pinned, head, problem = _find_head(history, symbol, instrument, deadline)
                if problem is not None and problem.kind == GatewayUnreachable.family:
                    gone = problem  # the other symbols need not try
            for timeframe in names:
                if pinned is None:
                    found.append(DataRange(symbol, timeframe.name, None, None, problem=problem))
                    continue
                series = Series(pinned, timeframe)
                why, latest, held = problem, None, None
                try:
                    latest = _last_complete(series, now)
                    with peek(store, series, now=now) as (view, _):
                        held = view.extent(series)
                except KtrdrError as error:
                    why = why or Problem.of(error)
                earliest = max(head, timeframe.retained_from(now) or head) if head else head
                found.append(
                    DataRange(
                        pinned.symbol,
                        timeframe.name,
                        earliest,
                        latest,
                        held.first if held else None,
                        held.last if held else None,
                        why,
                    )
                )
        return DataRanges(now, tuple(found), history.costs.requests)


def _choose_series(
    settings: Settings, symbols: Sequence[str] | None, timeframes: Sequence[str] | None
) -> dict[str, tuple[Instrument | None, list[Timeframe]]]:
    """By symbol: the instrument (None: not in the universe) and the timeframes."""
    chosen = list(dict.fromkeys(parse_timeframe(name) for name in timeframes)) if timeframes else None
    universe = universe_of(settings)
    listed: dict[str, list[Timeframe]] = {}
    for series in universe:
        listed.setdefault(series.instrument.symbol, []).append(series.timeframe)
    wanted: dict[str, tuple[Instrument | None, list[Timeframe]]] = {}
    for symbol in symbols or listed:
        file_symbol(symbol)
        instrument = universe.find_instrument(symbol)
        names = listed.get(instrument.symbol, []) if instrument else []
        wanted.setdefault(
            instrument.symbol if instrument else symbol, (instrument, chosen or names or [parse_timeframe("1d")])
        )
    if len(wanted) > RANGES_AT_ONCE:
        raise InputError(
            f"{len(wanted)} instruments at once",
            doing="finding the first bars at IB",
            advice=f"Name at most {RANGES_AT_ONCE} symbols: each costs one of {pacing.WINDOW_UNITS} requests in ten minutes.",
        )
    return wanted


def _find_head(
    history: IBHistory, symbol: str, instrument: Instrument | None, deadline: float
) -> tuple[Instrument | None, datetime | None, Problem | None]:
    """The pinned instrument, its head timestamp, and the problem. A failure is never reported as "no head timestamp"."""
    pinned: Instrument | None = instrument
    try:
        pinned = history.pin(instrument) if instrument else discover(symbol, history=history).instrument
        known = known_to_account(history)
        if (before := known.find_head(pinned)) is not None:
            return pinned, before.head, None
        client = history.connect()
        history.wait_for_history(client)
        with _acquire_grant(
            history, describe_head(pinned), min(deadline, time.monotonic() + PACING_PATIENCE_S)
        ) as grant:
            try:
                head = client.head_timestamp(pinned, timeout_s=QUICK_S, sending=grant.sending)
            except KtrdrError as error:
                if error.pauses_login:
                    history.ledger.penalise(error.observed)
                raise
            finally:
                history.costs.requests += grant.sent_at_s is not None
    except KtrdrError as error:
        return pinned, None, Problem.of(error)
    if head is not None and head <= history.now():  # one in the future is not remembered
        known.remember_head(pinned, head)
    return pinned, head, None


def _acquire_grant(history: IBHistory, ask: pacing.Ask, deadline: float) -> Grant:
    """The grant of the pacing ledger to send ``ask``, waited for until ``deadline`` (of the monotonic clock)."""
    waits: list[str] = []

    def remember(_seconds: float, rule: pacing.Rule, until_s: float) -> None:
        waits.append(f"the next request may be sent at {format_instant(datetime.fromtimestamp(until_s, UTC))} ({rule})")

    try:
        return history.ledger.acquire(ask, on_wait=remember, cancel=lambda: bool(waits) and time.monotonic() > deadline)
    except WaitCancelled:
        raise PacingError(waits[-1], advice="Try again then.") from None


def _last_complete(series: Series, now: datetime) -> datetime | None:
    back = timedelta(days=14) if series.timeframe.is_intraday else timedelta(days=93)
    bars = expected_bars(series, Window(now - back, now), complete_at_s=int(now.timestamp()))
    return datetime.fromtimestamp(int(bars.opens[-1]), UTC) if len(bars) else None


def _text(instant: datetime | None) -> str | None:
    return format_instant(instant) if instant else None
