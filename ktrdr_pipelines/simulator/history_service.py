"""From a history request to its answer: which contract, which window, which bars, or which refusal. Pure.

Prices come from the market given; faults and pacing are put on top in `gateway.py`; the wire's fields in `encoding.py`.
The order of the checks is the gateway's: what is malformed is refused before it counts as a request to IB's servers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ktrdr_pipelines.simulator import refusals
from ktrdr_pipelines.simulator.habits import USUAL, Habits
from ktrdr_pipelines.simulator.market import (
    BAR_SIZES,
    DAY_S,
    NO_BARS,
    Bars,
    BarSize,
    ContractQuery,
    Listing,
    Market,
    find_listings,
)
from ktrdr_pipelines.simulator.messages import HeadRequest, HistoryRequest
from ktrdr_pipelines.simulator.refusals import Refusal, RequestRefusedError
from ktrdr_pipelines.simulator.request_reach import (
    DurationRule,
    RequestLimits,
    check_duration,
    find_start,
    parse_duration,
    parse_end,
)
from ktrdr_pipelines.simulator.trading_hours import Sessions

WHAT_TO_SHOW = ("TRADES", "MIDPOINT", "BID", "ASK", "BID_ASK", "ADJUSTED_LAST", "AGGTRADES", "SCHEDULE")
_WITHOUT_TRADES = ("CASH", "CFD", "CRYPTO")
_SMALL_BARS_S = 30
_SMALL_BARS_KEPT_S = 183 * DAY_S
"""Bars of 30 seconds or less are kept for six months (`docs/ib_facts.md`, 5)."""


MAX_BARS = 200_000
"""Bars of one answer. More would not fit into a message that IBKR's clients take, and 68 years of minutes cost gigabytes."""


@dataclass(frozen=True)
class HistoryRules:
    """How this gateway reads requests. ``zone`` is its own, for ends without one and for formatDate 1."""

    zone: str = "America/New_York"
    durations: DurationRule = DurationRule.SESSIONS
    limits: RequestLimits = RequestLimits.CURRENT
    forget_small_bars: bool = True
    habits: Habits = USUAL


@dataclass(frozen=True)
class Lookup:
    """A valid request, ready to be looked up: bars that open in ``[start_s, end_s)``."""

    listing: Listing
    exchange: str
    size: BarSize
    what: str
    regular: bool
    start_s: int
    end_s: int
    notices: tuple[Refusal, ...] = ()

    @property
    def name(self) -> str:
        return self.listing.local_symbol or self.listing.symbol


@dataclass(frozen=True)
class Answer:
    """What goes back: a refusal, bars, sessions or a head timestamp (epoch seconds). ``start_s`` and ``end_s`` are the window
    that was looked up."""

    refusal: Refusal | None = None
    bars: Bars | None = None
    sessions: Sessions | None = None
    head: int | None = None
    start_s: int = 0
    end_s: int = 0
    notices: tuple[Refusal, ...] = ()


def resolve_contract(market: Market, query: ContractQuery, now_s: float) -> tuple[Listing, str]:
    """The one listing that ``query`` means and the exchange it is asked on.

    Raises:
        RequestRefusedError: 200, none or several.
    """
    found = find_listings(market, query, now_s)
    if not found:
        raise RequestRefusedError(refusals.UNKNOWN_CONTRACT)
    if len(found) > 1:
        raise RequestRefusedError(refusals.refuse_ambiguous(query.symbol or query.local_symbol))
    return found[0], query.exchange or found[0].default_exchange


def check_request(market: Market, request: HistoryRequest, now_s: int, rules: HistoryRules) -> Lookup:
    """Everything the gateway checks before it asks IB's servers.

    Raises:
        RequestRefusedError: with the code and text that IB answers.
    """
    size = BAR_SIZES.get(request.bar_size)
    if size is None:
        raise RequestRefusedError(refusals.BAD_BAR_SIZE)
    if request.what not in WHAT_TO_SHOW:
        raise RequestRefusedError(refusals.BAD_WHAT)
    if request.format_date not in ("1", "2"):
        raise RequestRefusedError(refusals.refuse_format_date(request.format_date))
    duration = parse_duration(request.duration)
    check_duration(duration, size, rules.limits)
    end_s, zone_guessed = parse_end(request.end, now_s, rules.zone)
    if request.end and request.what == "ADJUSTED_LAST":
        raise RequestRefusedError(refusals.END_WITH_ADJUSTED)
    if request.end and request.contract.sec_type == "CONTFUT":
        raise RequestRefusedError(refusals.END_WITH_CONTINUOUS)
    listing, exchange = resolve_contract(market, request.contract, now_s)
    check_what(listing, exchange, request.what, size)
    regular = request.use_rth
    start_s = find_start(duration, end_s, market.sessions(listing), regular=regular, rule=rules.durations)
    notices = (refusals.IMPLIED_ZONE,) if zone_guessed else ()
    return Lookup(listing, exchange, size, request.what, regular, start_s, end_s, notices)


def check_what(listing: Listing, exchange: str, what: str, size: BarSize | None = None) -> None:
    """Refuse trades of what has none, quotes of indices, and aggregated trades of anything but crypto.

    Raises:
        RequestRefusedError: 162.
    """
    is_crypto = listing.sec_type == "CRYPTO"
    without = what in ("TRADES", "ADJUSTED_LAST") and listing.sec_type in _WITHOUT_TRADES
    if without or (what == "AGGTRADES" and not is_crypto) or (listing.sec_type == "IND" and what != "TRADES"):
        step = "1d" if size is None or size.is_dated else str(size.seconds)
        raise RequestRefusedError(refusals.refuse_trades(listing.symbol, listing.sec_type, exchange, step))


def look_up(market: Market, lookup: Lookup, now_s: int, rules: HistoryRules) -> Answer:
    """The bars, or for SCHEDULE the sessions, of a checked request; "no data" where there are none."""
    answer = Answer(start_s=lookup.start_s, end_s=lookup.end_s, notices=lookup.notices)
    if lookup.what == "SCHEDULE":
        return replace(answer, sessions=_find_schedule(market, lookup))
    start_s = lookup.start_s
    if rules.forget_small_bars and lookup.size.seconds <= _SMALL_BARS_S:
        start_s = max(start_s, now_s - _SMALL_BARS_KEPT_S)
    bars = None
    if start_s < lookup.end_s:
        _check_length(market, replace(lookup, start_s=start_s))
        bars = market.bars(lookup.listing, lookup.size, start_s, lookup.end_s, what=lookup.what, regular=lookup.regular)
    if bars is None or not len(bars):
        if rules.habits.empty == "wordless":
            return replace(answer, bars=NO_BARS)
        return replace(answer, refusal=refusals.report_no_data(lookup.name, lookup.exchange, lookup.what))
    bars = rules.habits.date_bars(bars, lookup.size, market.sessions(lookup.listing))
    return replace(answer, bars=rules.habits.cut_answer(bars))


def _check_length(market: Market, lookup: Lookup) -> None:
    """Refuse what cannot be answered in one message, before it is looked up.

    Raises:
        RequestRefusedError: 162.
    """
    sessions = market.sessions(lookup.listing)
    first, stop = sessions.find_range(lookup.start_s, lookup.end_s, regular=lookup.regular)
    opens, closes = (ends(regular=lookup.regular)[first:stop] for ends in (sessions.opens, sessions.closes))
    if not lookup.size.is_dated and int((closes - opens).sum()) // lookup.size.seconds > MAX_BARS:
        raise RequestRefusedError(refusals.TOO_LONG)


def _find_schedule(market: Market, lookup: Lookup) -> Sessions:
    sessions = market.sessions(lookup.listing)
    first, stop = sessions.find_range(lookup.start_s, lookup.end_s, regular=lookup.regular)
    return sessions.take(slice(first, stop))


def find_head(market: Market, request: HeadRequest, now_s: float) -> tuple[Listing, str, int | None]:
    """The listing, its exchange and the first stamp there is (epoch seconds).

    Raises:
        RequestRefusedError: unknown or ambiguous contract, trades of what has none, unknown what-to-show.
    """
    if request.what not in WHAT_TO_SHOW[:-1]:
        raise RequestRefusedError(refusals.BAD_WHAT)
    listing, exchange = resolve_contract(market, request.contract, now_s)
    check_what(listing, exchange, request.what)
    return listing, exchange, market.head(listing, request.what, regular=request.use_rth)


def write_hours(sessions: Sessions, from_day: int, days: int, *, regular: bool) -> str:
    """Trading hours as contract details carry them: ``20240102:0930-20240102:1600;20240106:CLOSED`` in local time."""
    parts = []
    for day in range(from_day, from_day + days):
        at = int(np.searchsorted(sessions.day, day))
        if at < len(sessions) and sessions.day[at] == day:
            shift = sessions.offset[at]
            ends = (sessions.opens(regular=regular)[at] + shift, sessions.closes(regular=regular)[at] + shift)
            parts.append("-".join(_write_local(int(end)) for end in ends))
        else:
            parts.append(f"{_write_local(day * DAY_S)[:8]}:CLOSED")
    return ";".join(parts)


def _write_local(seconds: int) -> str:
    text = str(np.datetime64(seconds, "s"))
    return f"{text[:4]}{text[5:7]}{text[8:10]}:{text[11:13]}{text[14:16]}"
