"""What each of IB's message codes means for a request: one table, one reader.

A row says what follows (`Kind`), which error a person sees, what to do, and where the fact was learned. The code is matched
first, then the text; texts can be localised, so a text only ever *narrows* a code whose unmatched rest is a failure.
Nothing here waits, retries or talks to a gateway: see `client.py`, `ib/pacing/rules.py` and `ib/pacing/ledger.py`. What is
down at the moment is added up in `ib/wire/outages.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, time
from enum import StrEnum
from zoneinfo import ZoneInfo

from ktrdr_pipelines.domain.time import require_utc
from ktrdr_pipelines.errors import (
    BugError,
    GatewayUnreachable,
    KtrdrError,
    PacingError,
    PermanentError,
    TransientError,
)


class Kind(StrEnum):
    """What a message means for the request it came for."""

    EMPTY = "proven empty"
    """IB answered: there is nothing in this window."""
    FAILED = "failed"
    """The request is over and there is no answer."""
    CANCELLED = "cancelled"
    """The echo of a cancel, or a late word about a request that is gone. Neither data nor an answer."""
    NOTICE = "notice"
    """Ends nothing: a request that is waiting keeps waiting within its time-out."""


class Hold(StrEnum):
    """What can be down. `Outcome.holds` adds, `Outcome.releases` removes; farm by farm in `ib/wire/outages.py`."""

    LINK = "link between the gateway and IB"
    HISTORY = "history farm"
    DEFINITIONS = "contract farm"


class RequestLost(TransientError):
    """The gateway has forgotten the request, through no fault of it (1101): nothing speaks against asking again at once, as
    soon as pacing allows."""


@dataclass(frozen=True, slots=True)
class Code:
    """One row. ``pattern`` None matches every text of these codes; rows of one code are tried in order.

    ``error`` is raised when the message ends the request (FAILED), or by a caller whose patience with a NOTICE runs out; None
    where there is nothing to raise. ``advice`` is for people. ``pauses_login``: every process of the login has to wait.
    ``next_client_id``: connect again with another id. ``reconnect``: the socket is of no more use. ``needs_resubscribe``:
    requests that were open are lost and have to be asked again. ``releases_all``: every farm of the kinds in ``releases`` is
    back, not only the one that the text names. ``goes_on``: the gateway may go on with the request although it is over for
    us, so it has to be cancelled. ``source``: where this was learned.
    """

    codes: tuple[int, ...]
    pattern: re.Pattern[str] | None
    meaning: str
    kind: Kind
    error: type[KtrdrError] | None
    advice: str
    source: str
    holds: Hold | None = None
    releases: frozenset[Hold] = frozenset()
    releases_all: bool = False
    goes_on: bool = False
    pauses_login: bool = False
    next_client_id: bool = False
    reconnect: bool = False
    needs_resubscribe: bool = False

    def matches(self, code: int, text: str) -> bool:
        return code in self.codes and (self.pattern is None or self.pattern.search(text) is not None)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One message, understood: the message itself, and the row that applies (``is_known`` False: no row did)."""

    code: int
    text: str
    row: Code
    is_known: bool = True

    @property
    def kind(self) -> Kind:
        return self.row.kind

    @property
    def error(self) -> type[KtrdrError] | None:
        return self.row.error

    @property
    def advice(self) -> str:
        return self.row.advice

    @property
    def proven_empty(self) -> bool:
        return self.row.kind is Kind.EMPTY

    @property
    def ends_request(self) -> bool:
        """True if nothing more will come for the request that this message names."""
        return self.row.kind is not Kind.NOTICE

    @property
    def must_cancel(self) -> bool:
        """True if the gateway goes on with the request that this message ends for us."""
        return self.row.goes_on

    @property
    def holds(self) -> frozenset[Hold]:
        return frozenset() if self.row.holds is None else frozenset((self.row.holds,))

    @property
    def releases(self) -> frozenset[Hold]:
        return self.row.releases

    @property
    def releases_all(self) -> bool:
        return self.row.releases_all

    @property
    def farm(self) -> str:
        """The farm that a farm message names, in small letters; empty where it names none."""
        return name_farm(self.text)

    @property
    def needs_resubscribe(self) -> bool:
        return self.row.needs_resubscribe

    @property
    def pauses_login(self) -> bool:
        return self.row.pauses_login

    @property
    def next_client_id(self) -> bool:
        return self.row.next_client_id

    @property
    def reconnect(self) -> bool:
        return self.row.reconnect

    @property
    def ignore(self) -> bool:
        """True if there is nothing to do: log it (loudly when not `is_known`) and go on."""
        return self.row.kind is Kind.NOTICE and not (self.holds or self.releases or self.row.needs_resubscribe)

    @property
    def retry_helps(self) -> bool:
        return self.row.error is not None and self.row.error.retry_helps

    def to_error(self, doing: str = "") -> KtrdrError:
        """The exception for this message, with its code, what IB said, and what to do.

        A message that is no failure (proven empty, a mere notice) gives a BugError: whoever turned it into one was wrong.
        """
        observed = f"the gateway said {self.code} ({self.row.meaning}): {self.text.strip() or 'no text'}"
        if self.row.error is None:
            return BugError(
                f"{observed}; this is no failure but was handled as one",
                doing=doing,
                advice="Please report this.",
                code=self.code,
            )
        return self.row.error(observed, doing=doing, advice=self.row.advice, code=self.code)


_AFTER_COLON = re.compile(r"[:\uff1a]\s*([A-Za-z][^\s:\uff1a]*?)[.\u3002]?\s*$")
_AFTER_STOP = re.compile(r"[.\u3002]([A-Za-z]\w*)\s*$")


def name_farm(text: str) -> str:
    """The farm in the text of a farm message: the word behind the last colon ("... is broken:ushmds"), or behind a full stop
    without a space ("... available upon demand.ushmds"). Texts are localised, these names are not. Empty: none is named.
    """
    found = _AFTER_COLON.search(text) or _AFTER_STOP.search(text)
    return found.group(1).lower() if found else ""


_NEW_YORK = ZoneInfo("America/New_York")
_RESET_FROM, _RESET_TO = time(23, 45), time(0, 45)


def in_nightly_reset(now: datetime) -> bool:
    """True from 23:45 to 00:45 New York, end not included: IB restarts its servers and valid contracts are unknown.

    Source: IBKR's system status page and public threads ("about"; `docs/ib_facts.md`, 8). Raises ValueError if naive.
    """
    local = require_utc(now, "now").astimezone(_NEW_YORK).time()
    return local >= _RESET_FROM or local < _RESET_TO


def _text(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


_DOC = "IBKR's message codes page"
_LIMITS = "IBKR's historical data limitations page"
_THREADS = "public issue threads"
_FACTS = "docs/ib_facts.md, 8"

_SLOW_DOWN = (
    "All processes of this login now wait; nothing to do. Look for another program on the same login if it repeats."
)
_SUBSCRIBE = (
    "Subscribe to this market's data in IB's Client Portal (Settings, Market Data Subscriptions), or share the live "
    "account's data with the paper account."
)
_ELSEWHERE = (
    "The same login is in use elsewhere (TWS, the phone app, another machine): log out there, or use a second login."
)
_REPORT = "Please report this with the line above: the request itself was wrong."
_RECONNECT = "Check that TWS or IB Gateway runs, is logged in, and accepts API clients on this port."
_UNKNOWN = (
    "If it persists, look the code up on IBKR's message codes page and report it, so that it gets a row of its own."
)
_UNKNOWN_HISTORY = (
    "It is not IB's English \"query returned no data\", so it proves nothing. Set the gateway's language to English if the text "
    "above is in another one; otherwise, if it persists, report it, so that it gets a row of its own."
)
_RIDE_OUT = "Requests are held until the gateway says that it is back; nothing to do unless it lasts."


_ASK_AGAIN = "Open requests are asked again."
_ALL_FARMS = r"all\s+data\s+farms\s+are\s+connected"

CODES: tuple[Code, ...] = (
    # -- answers of the history service (162), most alarming first: one text may hold several of these phrases
    Code((162,), _text(r"\bpacing\b"), "pacing violation", Kind.FAILED, PacingError, _SLOW_DOWN,
         f"{_FACTS}; {_LIMITS}", pauses_login=True),
    Code((162,), _text(r"different\s+IP"), "competing session", Kind.FAILED, TransientError, _ELSEWHERE,
         f"{_FACTS}; {_THREADS}", pauses_login=True),
    Code((162,), _text(r"no\s+market\s+data\s+permissions?"), "no permission", Kind.FAILED, PermanentError, _SUBSCRIBE,
         f"{_FACTS}; ib_insync thread 461"),
    Code((162,), _text(r"invalid\s+step"), "bad duration or bar size", Kind.FAILED, BugError, _REPORT, _FACTS),
    Code((162,), _text(r"query\s+cancell?ed"), "cancelled", Kind.CANCELLED, TransientError,
         "The request was given up before it was answered; it says nothing about the data.",
         f"{_FACTS}; ib_insync thread 268"),
    Code((162,), _text(r"query\s+returned\s+no\s+data"), "no data in the window", Kind.EMPTY, None,
         "", f"{_FACTS}; Lean thread 4344"),
    Code((162,), None, "history service error", Kind.FAILED, TransientError, _UNKNOWN_HISTORY,
         f"{_FACTS}: any other 162 is a failure, never empty"),
    # -- the request
    Code((321,), _text(r"read-?\s?only"), "gateway is read-only", Kind.NOTICE, None,
         "Read-only is how this program wants it: it places no orders.", _THREADS),
    Code((321,), None, "request refused as malformed", Kind.FAILED, BugError, _REPORT, f"{_FACTS}; {_DOC}"),
    Code((322,), _text(r"simultaneous"), "too many open history requests", Kind.FAILED, PacingError, _SLOW_DOWN,
         f"{_LIMITS} (at most 50 open); wording from {_THREADS}", pauses_login=True),
    Code((322,), None, "request could not be processed", Kind.FAILED, TransientError, _UNKNOWN, _DOC),
    Code((2174,), None, "time without a zone", Kind.FAILED, BugError,
         "The end of a request went out without its zone: its bars could be shifted by hours and are dropped. "
         "Please report this.", _FACTS, goes_on=True),
    Code((10314,), None, "end time not understood", Kind.FAILED, BugError, _REPORT, f"{_DOC}; {_THREADS}"),
    Code((10339,), None, "end time given for a continuous future", Kind.FAILED, BugError, _REPORT, _FACTS),
    Code((366,), None, "no such request open", Kind.CANCELLED, TransientError,
         "A late word about a request that is gone; it says nothing about the data.", _FACTS),
    Code((165,), None, "history farm notice", Kind.NOTICE, None, "", _FACTS),
    # -- pacing outside 162
    Code((420,), None, "pacing violation (real time)", Kind.FAILED, PacingError, _SLOW_DOWN, _FACTS, pauses_login=True),
    Code((100,), None, "more than 50 messages a second", Kind.FAILED, PacingError, _SLOW_DOWN, _DOC, pauses_login=True),
    # -- who may see what
    Code((354, 10089, 10090, 10168, 10187), None, "market data not subscribed", Kind.FAILED, PermanentError, _SUBSCRIBE,
         f"{_FACTS}; 10089 and 10168: {_DOC}"),
    Code((10167,), None, "delayed quotes instead of live ones", Kind.NOTICE, None,
         "Only streaming quotes are delayed; bars are not.", f"{_DOC}; {_THREADS}"),
    Code((10197,), None, "competing live session", Kind.FAILED, TransientError, _ELSEWHERE, _FACTS, pauses_login=True),
    # -- the contract
    Code((166,), None, "expired contract", Kind.FAILED, PermanentError,
         "IB keeps no history of this expired contract: futures go two years back, options none.", _FACTS),
    Code((200,), _text(r"ambiguous"), "several contracts match", Kind.FAILED, PermanentError,
         "Say more about the contract in the universe file: primary exchange, currency or expiry.", _THREADS),
    Code((200,), None, "no such contract", Kind.FAILED, PermanentError,
         "Check symbol, kind, exchange and currency, and that the instrument is not delisted.", f"{_FACTS}; {_DOC}"),
    # -- the connection
    Code((326,), None, "client id in use", Kind.FAILED, RequestLost, "The next client id is taken.", _FACTS,
         next_client_id=True, reconnect=True),
    Code((502, 504), None, "not connected", Kind.FAILED, GatewayUnreachable, _RECONNECT, _FACTS, reconnect=True),
    Code((1300,), None, "the gateway's port has changed", Kind.FAILED, GatewayUnreachable,
         "The port was changed in the gateway's settings: set IB_PORT to the new one.", _FACTS, reconnect=True),
    Code((1100, 2110), None, "link to IB lost", Kind.NOTICE, TransientError, _RIDE_OUT, f"{_FACTS}; 2110: {_DOC}",
         holds=Hold.LINK),
    Code((1101,), _text(_ALL_FARMS), "link to IB back, all farms too, requests lost", Kind.NOTICE, RequestLost, _ASK_AGAIN,
         f"{_FACTS}; wording from {_THREADS}", releases=frozenset(Hold), releases_all=True, needs_resubscribe=True,
         goes_on=True),
    Code((1101,), None, "link to IB back, requests lost", Kind.NOTICE, RequestLost, _ASK_AGAIN,
         _FACTS, releases=frozenset((Hold.LINK,)), releases_all=True, needs_resubscribe=True, goes_on=True),
    Code((1102,), _text(_ALL_FARMS), "link to IB back, all farms too", Kind.NOTICE, None, "",
         f"{_FACTS}; wording from {_THREADS}", releases=frozenset(Hold), releases_all=True),
    Code((1102,), None, "link to IB back, requests kept", Kind.NOTICE, None, "", _FACTS,
         releases=frozenset((Hold.LINK,)), releases_all=True),
    # -- the farms. Streaming quotes (2103, 2104, 2108, 2119) do not concern history.
    Code((2105,), None, "history farm broken", Kind.NOTICE, TransientError, _RIDE_OUT, _FACTS, holds=Hold.HISTORY),
    Code((2106, 2107), None, "history farm fine or idle", Kind.NOTICE, None, "", _FACTS,
         releases=frozenset((Hold.HISTORY,))),
    Code((2157,), None, "contract farm broken", Kind.NOTICE, TransientError, _RIDE_OUT, f"{_FACTS}; {_DOC}",
         holds=Hold.DEFINITIONS),
    Code((2158,), None, "contract farm fine", Kind.NOTICE, None, "", f"{_FACTS}; {_DOC}",
         releases=frozenset((Hold.DEFINITIONS,))),
    Code((2103, 2104, 2108, 2119), None, "quote farm status", Kind.NOTICE, None, "", f"{_FACTS}; 2119: {_DOC}"),
)  # fmt: skip
"""Every message this program knows. Add one row per new message, with its source; the tests walk the table."""

_UNKNOWN_NOTICE = Code((), None, "notice without a row here", Kind.NOTICE, None, _UNKNOWN,
                       f"{_DOC}: 2100 to 2199 are the gateway's warnings, which leave requests as they are")  # fmt: skip
_UNKNOWN_FAILURE = Code((), None, "code without a row here", Kind.FAILED, TransientError, _UNKNOWN,
                        "design: what is not known to be an answer is a failure")  # fmt: skip
_EMPTY_OUTSIDE_BARS = Code((162,), None, "no history to date", Kind.FAILED, PermanentError,
                           "IB keeps no history of this kind for the instrument: check what to show.",
                           f"{_FACTS}; {_THREADS}")  # fmt: skip
_NOT_NOW = Code((200,), None, "contract not found while IB restarts", Kind.FAILED, TransientError,
                "IB's servers restart from about 23:45 to 00:45 New York, and do not know valid contracts then. Try later.",
                f"{_FACTS}; ib_insync thread 330")  # fmt: skip
_FARM_DOWN = Code((162, 200), None, "answered while a farm is down", Kind.FAILED, TransientError, _RIDE_OUT,
                  "design: an answer of a broken farm proves nothing; ib_insync thread 330")  # fmt: skip


def classify(
    code: int, text: str, *, now: datetime, during_history: bool = True, held: Collection[Hold] = frozenset()
) -> Outcome:
    """What message ``code`` with ``text`` means.

    ``now`` is aware; it decides whether a 200 falls into the nightly reset. ``during_history`` says that the message answers
    a request for **bars**: only such an answer can prove a window empty (the same text for a head timestamp is a
    permanent failure). ``held`` is what is known to be down: then neither "no data" nor "no such contract" is believed.
    A code without a row is a failure that may be tried again; only in 2100 to 2199, the gateway's range of warnings, it
    is a notice, because such a message leaves the request running and its bars would be thrown away.

    Raises:
        ValueError: ``now`` has no zone.
    """
    require_utc(now, "now")
    for row in CODES:
        if row.matches(code, text):
            return Outcome(code, text, _adjust(row, now, during_history, held))
    return Outcome(code, text, _UNKNOWN_NOTICE if 2100 <= code <= 2199 else _UNKNOWN_FAILURE, is_known=False)


def _adjust(row: Code, now: datetime, during_history: bool, held: Collection[Hold]) -> Code:
    if row.kind is Kind.EMPTY:
        if Hold.HISTORY in held or Hold.LINK in held:
            return _FARM_DOWN
        return row if during_history else _EMPTY_OUTSIDE_BARS
    if row.codes == (200,) and row.pattern is None:
        if Hold.DEFINITIONS in held or Hold.LINK in held:
            return _FARM_DOWN
        if in_nightly_reset(now):
            return _NOT_NOW
    return row


def to_error(
    code: int,
    text: str,
    *,
    now: datetime,
    doing: str = "",
    during_history: bool = True,
    held: Collection[Hold] = frozenset(),
) -> KtrdrError:
    """`classify` and `Outcome.to_error` in one: always a KtrdrError, never a bare exception."""
    return classify(code, text, now=now, during_history=during_history, held=held).to_error(doing)
