"""The pacing rules: when the next history request may go, a pure decision from past requests and now.

The rules are the specification's "Pacing Limits (Per IB)" and IBKR's "Historical Data Limitations" page (docs/ib_facts.md, 6).
They apply per login, to every bar size, and are not settings. Which of several waiting requests may use the room that the rules
leave is decided in `shares.py`. No clock, storage or sleeping here: `ledger.py` remembers, across processes.

Libraries tried (pyrate-limiter, limits, throttled, aiolimiter) broke the limit with several processes: none decides weights and
several rules in one step (docs/dependencies.md, pacing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter

from ktrdr_pipelines.domain.work_class import WorkClass

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

WINDOW_MARGIN_S = 0.5
IDENTICAL_MARGIN_S = 0.1
BURST_MARGIN_S = 0.08
"""Every rule's time is this much longer than IB's. We stamp when we write to the socket, IB counts when it reads: of two requests
the first may travel slower than the second, which brings them closer together at IB's end. On one connection they stay in
order and differ by milliseconds; several processes have several connections, which a busy gateway may serve in turn. What it
reads late is counted late once its answer shows that (`MOST_DELAY_S`). The margin follows the rule: half a second of ten
minutes costs a tenth of a percent of the budget, of two seconds it would be a quarter. The short rules are broken by a delay
of one message alone, and the answer to it is a pause of 15 s; a wrong ten minutes could cost the login."""

MOST_DELAY_S = 0.35
"""A request whose answer takes longer than the fastest one may have been read so much later than it was stamped, at most: in a
burst of five a gateway that computes each answer before it reads on was seen to date the last ones a third of a second late."""

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
    QUEUE = "another request goes first"
    RESERVE = "room is kept for tails and questions"
    SPREAD = "a long backfill spreads its requests"


@dataclass(frozen=True, slots=True)
class Ask:
    """One history request, as far as pacing is concerned. Build it with `bars_ask`, `head_ask` or `schedule_ask`.

    ``identity`` is the whole request: two asks are identical only if all of it is equal. ``contract`` is contract, exchange and
    tick type. ``weight`` is 2 for BID_ASK.
    """

    identity: str
    contract: str
    weight: int = 1

    @property
    def symbol(self) -> str:
        """The contract's symbol at IB, for display; the whole text where it is not from `contract_text`."""
        text = self.contract.partition("\x1f")[0]
        parts = text.split(":")
        return parts[1] if len(parts) == 4 else text

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
    """A past request: when it went out (same clock as ``now_s``), what it was, whether it is unanswered, its class, and how long
    it had waited when it went out."""

    at_s: float
    ask: Ask
    is_open: bool = False
    work: WorkClass = WorkClass.INTERACTIVE
    waited_s: float = 0.0

    @property
    def wanted_at_s(self) -> float:
        """When it was first asked for."""
        return self.at_s - self.waited_s


@dataclass(frozen=True, slots=True)
class Go:
    """The request may be sent now."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Not yet: ask again in ``seconds`` (more than 0), because of ``rule``. ``reason`` explains it to the user.

    ``again_s``: when ``seconds`` is only an estimate, how soon the decision may change; None: not before ``seconds``.
    """

    seconds: float
    rule: Rule
    reason: str = ""
    again_s: float | None = None

    @property
    def look_again_s(self) -> float:
        """Seconds until it is worth deciding again."""
        return self.seconds if self.again_s is None else self.again_s


TICK_S = 1e-3
"""Added to every wait: windows are closed, so the instant at which an entry is exactly as old as the window is too early."""


@dataclass(slots=True)
class _Window:
    """One rule while the past is read from its newest entry back: a closed window of ``span_s`` with at most ``room`` units."""

    rule: Rule
    span_s: float
    room: int
    units: int = 0
    free_at_s: float | None = None
    """The last instant whose window has too many units; None: none has."""

    def count(self, at_s: float, units: int) -> None:
        self.units += units
        if self.free_at_s is None and self.units > self.room:
            self.free_at_s = at_s + self.span_s


def decide(past: Sequence[Entry], wanted: Ask, now_s: float, pause_until_s: float | None = None) -> Go | Wait:
    """May ``wanted`` be sent at ``now_s``, by the rules alone?

    ``past`` in any order; entries after ``now_s`` (a clock was set back) count as sent now. Windows are closed, and longer by
    their margin: an entry exactly 600 s old still counts. ``Wait.seconds`` leads to the earliest time at which all rules agree
    if nothing else is sent; ``rule`` is the one that takes longest. ``pause_until_s``: end of a pause of all processes.
    """
    windows, open_requests = _read_windows(past, wanted, now_s)
    waits: list[Wait] = []
    if pause_until_s is not None and pause_until_s > now_s:
        waits.append(Wait(pause_until_s - now_s, Rule.PAUSE))
    for each in windows:
        # Not the difference: a rounded-down difference would make the caller come back too early, again and again.
        if each.free_at_s is not None and each.free_at_s >= now_s:
            waits.append(Wait(max(each.free_at_s - now_s, 0.0) + TICK_S, each.rule))
    if open_requests >= OPEN_REQUESTS:
        waits.append(Wait(OPEN_POLL_S, Rule.OPEN))
    return max(waits, key=lambda wait: wait.seconds) if waits else Go()


def _read_windows(past: Sequence[Entry], wanted: Ask, now_s: float) -> tuple[tuple[_Window, ...], int]:
    """The windows of the three rules, and how many requests are unanswered."""
    window = _Window(Rule.WINDOW, WINDOW_S + WINDOW_MARGIN_S, WINDOW_UNITS - wanted.weight)
    burst = _Window(Rule.BURST, BURST_S + BURST_MARGIN_S, BURST_UNITS - 1 - wanted.weight)
    identical = _Window(Rule.IDENTICAL, IDENTICAL_S + IDENTICAL_MARGIN_S, 0)
    open_requests = 0
    for entry in sorted(past, key=attrgetter("at_s"), reverse=True):
        at_s = min(entry.at_s, now_s)
        if at_s + window.span_s < now_s:
            break  # this one and all before it are older than the longest rule
        window.count(at_s, entry.ask.weight)
        open_requests += entry.is_open
        if entry.ask.contract == wanted.contract:
            burst.count(at_s, entry.ask.weight)
        if entry.ask.identity == wanted.identity:
            identical.count(at_s, 1)
    return (window, burst, identical), open_requests


def used_units(past: Sequence[Entry], now_s: float) -> int:
    """How many of the `WINDOW_UNITS` are taken at ``now_s``."""
    return sum(e.ask.weight for e in past if min(e.at_s, now_s) + WINDOW_S + WINDOW_MARGIN_S >= now_s)


def penalty_s(recent: int) -> float:
    """How long all processes pause after a pacing violation, when ``recent`` others came within `PENALTY_MEMORY_S`."""
    return PENALTIES_S[min(recent, len(PENALTIES_S) - 1)]
