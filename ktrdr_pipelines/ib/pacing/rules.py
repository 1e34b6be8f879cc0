"""The pacing rules: when the next history request may go, a pure decision from past requests and now.

The rules are the specification's "Pacing Limits (Per IB)" and IBKR's "Historical Data Limitations" page (docs/ib_facts.md, 6).
They apply per login, to every bar size, and are not settings. No clock, storage or sleeping here: `ledger.py` remembers, across
processes.

Libraries tried (pyrate-limiter, limits, throttled, aiolimiter) broke the limit with several processes: none decides weights and
several rules in one step (docs/dependencies.md, pacing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

WINDOW_S = 600.0
WINDOW_UNITS = 60
"""At most 60 requests in any ten minutes; a BID_ASK request counts as two."""
IDENTICAL_S = 15.0
"""No identical request within 15 seconds."""
BURST_S = 2.0
BURST_UNITS = 6
"""*Fewer* than six requests for the same contract, exchange and tick type within two seconds. BID_ASK counts twice here too:
the specification has it for requests, not for one rule."""
OPEN_REQUESTS = 50
"""At most 50 history requests may be unanswered at a time."""

MARGIN_S = 0.5
"""Every window is this much longer than the rule says. We stamp when we write to the socket, IB counts when it reads: of two
requests the first may travel slower than the second, which brings them closer together at IB's end. Half a second is far
more than that differs on a working link, and costs a tenth of a percent of the budget."""

OPEN_POLL_S = 1.0
"""The end of an open request cannot be computed; look again after this long."""

PENALTIES_S = (15.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Pause of all processes after a pacing violation: the specification's backoff. The n-th in a row gets the n-th."""
PENALTY_MEMORY_S = 1200.0
"""Two violations are "in a row" when they are no further apart than this: two windows of ten minutes."""


class Rule(StrEnum):
    """Why a request has to wait."""

    WINDOW = "60 requests in 10 minutes"
    IDENTICAL = "no identical request within 15 seconds"
    BURST = "fewer than six requests for one contract within 2 seconds"
    OPEN = "at most 50 open requests"
    PAUSE = "pause of all processes"
    QUEUE = "another request has waited longer"


@dataclass(frozen=True, slots=True)
class Ask:
    """One history request, as far as pacing is concerned. Build it with `bars_ask`, `head_ask` or `schedule_ask`.

    ``identity`` is the whole request: two asks are identical only if all of it is equal. ``contract`` is contract, exchange and
    tick type. ``weight`` is 2 for BID_ASK.
    """

    identity: str
    contract: str
    weight: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.weight < BURST_UNITS:
            raise ValueError(f"a request weighs at least 1 and less than {BURST_UNITS}, not {self.weight}")


def _ask(kind: str, contract: str, exchange: str, what_to_show: str, *rest: object) -> Ask:
    # A separator that no field contains: "A" + "BC" and "AB" + "C" must stay different requests.
    key = "\x1f".join((contract, exchange.upper(), what_to_show.upper()))
    identity = "\x1f".join((kind, key, *(str(part) for part in rest)))
    return Ask(identity, key, 2 if what_to_show.upper() == "BID_ASK" else 1)


def bars_ask(
    *, contract: str, exchange: str, what_to_show: str, bar_size: str, duration: str, end: str, use_rth: bool
) -> Ask:
    """A request for bars.

    ``contract`` must be the same text for the same contract in every process, before and after its conId is known:
    see `contract_text`. ``end`` is the text that goes on the wire; empty means now, and two of those are identical.
    """
    return _ask("bars", contract, exchange, what_to_show, bar_size, duration, end, int(use_rth))


def head_ask(*, contract: str, exchange: str, what_to_show: str, use_rth: bool) -> Ask:
    """A request for the start of history; it counts like any other (IBKR's documentation)."""
    return _ask("head", contract, exchange, what_to_show, int(use_rth))


def schedule_ask(*, contract: str, exchange: str, duration: str, end: str, use_rth: bool) -> Ask:
    """A request for the sessions of an instrument; on the wire a bars request showing SCHEDULE."""
    return _ask("bars", contract, exchange, "SCHEDULE", "1 day", duration, end, int(use_rth))


def contract_text(*, sec_type: str, ib_symbol: str, currency: str, expiry: str = "") -> str:
    """The name of a contract in an `Ask`: made of what is known before IB was asked, never of the conId, so that a request made
    before and one made after the contract was pinned are the same contract. Leaving out the primary exchange can only
    merge contracts, which is the cautious side."""
    return ":".join((sec_type, ib_symbol, currency, expiry)).upper()


@dataclass(frozen=True, slots=True)
class Entry:
    """A past request: when it went out (same clock as ``now_s``), what it was, and whether it is unanswered."""

    at_s: float
    ask: Ask
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class Go:
    """The request may be sent now."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Not yet: ask again in ``seconds`` (more than 0), because of ``rule``. ``reason`` explains it to the user."""

    seconds: float
    rule: Rule
    reason: str = ""


def decide(past: Sequence[Entry], wanted: Ask, now_s: float, pause_until_s: float | None = None) -> Go | Wait:
    """May ``wanted`` be sent at ``now_s``?

    ``past`` in any order; entries after ``now_s`` (a clock was set back) count as sent now. Windows are closed, and longer by
    `MARGIN_S`: an entry exactly 600 s old still counts. ``Wait.seconds`` leads to the earliest time at which all rules agree
    if nothing else is sent; ``rule`` is the one that takes longest. ``pause_until_s``: end of a pause of all processes.
    """
    waits: list[Wait] = []
    if pause_until_s is not None and pause_until_s > now_s:
        waits.append(Wait(pause_until_s - now_s, Rule.PAUSE))
    everything = [(min(e.at_s, now_s), e.ask.weight) for e in past]
    same_contract = [(min(e.at_s, now_s), e.ask.weight) for e in past if e.ask.contract == wanted.contract]
    identical = [(min(e.at_s, now_s), 1) for e in past if e.ask.identity == wanted.identity]
    for rule, entries, span_s, room in (
        (Rule.WINDOW, everything, WINDOW_S, WINDOW_UNITS - wanted.weight),
        (Rule.BURST, same_contract, BURST_S, BURST_UNITS - 1 - wanted.weight),
        (Rule.IDENTICAL, identical, IDENTICAL_S, 0),
    ):
        free_at = _room_at(entries, span_s + MARGIN_S, room)
        # Not the difference: a rounded-down difference would make the caller come back too early, again and again.
        if free_at is not None and free_at >= now_s:
            waits.append(Wait(max(free_at - now_s, 0.0) + _TICK_S, rule))
    if sum(e.is_open for e in past) >= OPEN_REQUESTS:
        waits.append(Wait(OPEN_POLL_S, Rule.OPEN))
    return max(waits, key=lambda wait: wait.seconds) if waits else Go()


_TICK_S = 1e-3
"""Added to every wait: windows are closed, so the instant at which an entry is exactly as old as the window is too early."""


def _room_at(entries: list[tuple[float, int]], span_s: float, room: int) -> float | None:
    """The last instant whose closed window of ``span_s`` before it has more than ``room`` units; None if there is none."""
    units = 0
    for at_s, weight in sorted(entries, reverse=True):
        units += weight
        if units > room:
            return at_s + span_s
    return None


def used_units(past: Sequence[Entry], now_s: float) -> int:
    """How many of the `WINDOW_UNITS` are taken at ``now_s``."""
    return sum(e.ask.weight for e in past if min(e.at_s, now_s) + WINDOW_S + MARGIN_S >= now_s)


def penalty_s(recent: int) -> float:
    """How long all processes pause after a pacing violation, when ``recent`` others came within `PENALTY_MEMORY_S`."""
    return PENALTIES_S[min(recent, len(PENALTIES_S) - 1)]
