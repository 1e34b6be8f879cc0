"""The meaning of each of IB's message codes for a request: one table, one reader (docs/ib_facts.md, 8).

A row has what follows (`Kind`), the error that is raised, what the user can do, and the source of the fact. The code is matched
first, then the text; texts can be localised, so a text only ever *narrows* a code whose unmatched rest is a failure.
Nothing here waits, retries or talks to a gateway: see `client.py`, `ib/pacing/rules.py` and `ib/pacing/ledger.py`. The present
outages are added up in `ib/wire/outages.py`.
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
    """What a message means for the request it names."""

    EMPTY = "no data"
    """IB answered: there is nothing in this window."""
    FAILED = "failed"
    """The request is over and there is no answer."""
    CANCELLED = "cancelled"
    """The echo of a cancel, or a late message about a request that is gone. Neither data nor an answer."""
    NOTICE = "notice"
    """Ends nothing: a request that is waiting keeps waiting within its time-out."""


class Outage(StrEnum):
    """What can be out. `Outcome.begins` adds, `Outcome.ends` removes; farm by farm in `ib/wire/outages.py`."""

    LINK = "link between the gateway and IB"
    HISTORY = "history farm"
    DEFINITIONS = "contract farm"


class RequestLost(TransientError):
    """The gateway has lost the request, through no fault of the request (1101): it may be sent again at once, as soon as pacing
    allows."""


@dataclass(frozen=True, slots=True)
class Code:
    """One row. ``pattern`` None matches every text of these codes; rows of one code are tried in order.

    ``error`` is raised when the message ends the request (FAILED), or by a caller whose patience with a NOTICE runs out; None
    where there is nothing to raise. ``advice`` is for the user. ``pauses_login``: every process of the login has to wait.
    ``next_client_id``: connect again with another id. ``reconnect``: the socket is of no more use. ``needs_resubscribe``:
    requests that were open are lost and have to be asked again. ``ends_all``: every farm of the kinds in ``ends`` is
    back, not only the one that the text names. ``goes_on``: the gateway may go on with the request although it is over
    here, so it has to be cancelled. ``source``: where this was learned.
    """

    codes: tuple[int, ...]
    pattern: re.Pattern[str] | None
    meaning: str
    kind: Kind
    error: type[KtrdrError] | None
    advice: str
    source: str
    begins: Outage | None = None
    ends: frozenset[Outage] = frozenset()
    ends_all: bool = False
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
    def is_empty(self) -> bool:
        """True if IB answered that the window has no data."""
        return self.row.kind is Kind.EMPTY

    @property
    def ends_request(self) -> bool:
        """True if nothing more will come for the request that this message names."""
        return self.row.kind is not Kind.NOTICE

    @property
    def begins(self) -> frozenset[Outage]:
        return frozenset() if self.row.begins is None else frozenset((self.row.begins,))

    @property
    def farm(self) -> str:
        """The farm that a farm message names, in small letters; empty where it names none."""
        return name_farm(self.text)

    def to_error(self, doing: str = "") -> KtrdrError:
        """The exception for this message, with its code, IB's text, and what to do.

        A message that is no failure ("no data", a notice) becomes a BugError: the caller must not raise it.
        """
        observed = f"the gateway answered {self.code} ({self.row.meaning}): {self.text.strip() or 'no text'}"
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

    Source: IBKR's system status page and public threads ("about"; docs/ib_facts.md, 8). Raises ValueError if naive.
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
    "It is not IB's English \"query returned no data\", so it is no evidence. Set the gateway's language to English if the text "
    "above is in another one; otherwise, if it persists, report it, so that it gets a row of its own."
)
_WAIT = "Requests wait until the gateway reports the end of the outage; nothing to do unless it lasts."

_ASK_AGAIN = "Open requests are asked again."
_ALL_FARMS = r"all\s+data\s+farms\s+are\s+connected"

CODES: tuple[Code, ...] = (
    # -- answers of the history service (162), most alarming first: one text may contain several of these phrases
    Code((162,), _text(r"\bpacing\b"), "pacing violation", Kind.FAILED, PacingError, _SLOW_DOWN,
         f"{_FACTS}; {_LIMITS}", pauses_login=True),
    Code((162,), _text(r"different\s+IP"), "competing session", Kind.FAILED, TransientError, _ELSEWHERE,
         f"{_FACTS}; {_THREADS}", pauses_login=True),
    Code((162,), _text(r"no\s+market\s+data\s+permissions?"), "no permission", Kind.FAILED, PermanentError, _SUBSCRIBE,
         f"{_FACTS}; ib_insync thread 461"),
    Code((162,), _text(r"invalid\s+step"), "bad duration or bar size", Kind.FAILED, BugError, _REPORT, _FACTS),
    Code((162,), _text(r"query\s+cancell?ed"), "cancelled", Kind.CANCELLED, TransientError,
         "The request was given up before it was answered; this is no evidence about the data.",
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
         "A late message about a request that is gone; this is no evidence about the data.", _FACTS),
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
         "This expired contract is beyond IB's retention: futures go two years back, options none.", _FACTS),
    Code((200,), _text(r"ambiguous"), "several contracts match", Kind.FAILED, PermanentError,
         "Describe the contract in more detail in the universe file: primary exchange, currency or expiry.", _THREADS),
    Code((200,), None, "no such contract", Kind.FAILED, PermanentError,
         "Check symbol, kind, exchange and currency, and that the instrument is not delisted.", f"{_FACTS}; {_DOC}"),
    # -- the connection
    Code((326,), None, "client id in use", Kind.FAILED, RequestLost, "The next client id is taken.", _FACTS,
         next_client_id=True, reconnect=True),
    Code((502, 504), None, "not connected", Kind.FAILED, GatewayUnreachable, _RECONNECT, _FACTS, reconnect=True),
    Code((1300,), None, "the gateway's port has changed", Kind.FAILED, GatewayUnreachable,
         "The port was changed in the gateway's settings: set IB_PORT to the new one.", _FACTS, reconnect=True),
    Code((1100, 2110), None, "link to IB lost", Kind.NOTICE, TransientError, _WAIT, f"{_FACTS}; 2110: {_DOC}",
         begins=Outage.LINK),
    Code((1101,), _text(_ALL_FARMS), "link to IB back, all farms too, requests lost", Kind.NOTICE, RequestLost, _ASK_AGAIN,
         f"{_FACTS}; wording from {_THREADS}", ends=frozenset(Outage), ends_all=True, needs_resubscribe=True,
         goes_on=True),
    Code((1101,), None, "link to IB back, requests lost", Kind.NOTICE, RequestLost, _ASK_AGAIN,
         _FACTS, ends=frozenset((Outage.LINK,)), ends_all=True, needs_resubscribe=True, goes_on=True),
    Code((1102,), _text(_ALL_FARMS), "link to IB back, all farms too", Kind.NOTICE, None, "",
         f"{_FACTS}; wording from {_THREADS}", ends=frozenset(Outage), ends_all=True),
    Code((1102,), None, "link to IB back, requests kept", Kind.NOTICE, None, "", _FACTS,
         ends=frozenset((Outage.LINK,)), ends_all=True),
    # -- the farms. Streaming quotes (2103, 2104, 2108, 2119) do not concern history.
    Code((2105,), None, "history farm broken", Kind.NOTICE, TransientError, _WAIT, _FACTS, begins=Outage.HISTORY),
    Code((2106, 2107), None, "history farm fine or idle", Kind.NOTICE, None, "", _FACTS,
         ends=frozenset((Outage.HISTORY,))),
    Code((2157,), None, "contract farm broken", Kind.NOTICE, TransientError, _WAIT, f"{_FACTS}; {_DOC}",
         begins=Outage.DEFINITIONS),
    Code((2158,), None, "contract farm fine", Kind.NOTICE, None, "", f"{_FACTS}; {_DOC}",
         ends=frozenset((Outage.DEFINITIONS,))),
    Code((2103, 2104, 2108, 2119), None, "quote farm status", Kind.NOTICE, None, "", f"{_FACTS}; 2119: {_DOC}"),
)  # fmt: skip
"""Every message that this program knows. Add one row per new message, with its source; the tests walk the table."""

_UNKNOWN_NOTICE = Code((), None, "notice without a row here", Kind.NOTICE, None, _UNKNOWN,
                       f"{_DOC}: 2100 to 2199 are the gateway's warnings, which leave requests as they are")  # fmt: skip
_UNKNOWN_FAILURE = Code((), None, "code without a row here", Kind.FAILED, TransientError, _UNKNOWN,
                        "docs/design.md, 6: what is not known to be an answer is a failure")  # fmt: skip
_EMPTY_OUTSIDE_BARS = Code((162,), None, "no history to date", Kind.FAILED, PermanentError,
                           "IB has no history of this kind for the instrument: check what to show.",
                           f"{_FACTS}; {_THREADS}")  # fmt: skip
_NOT_NOW = Code((200,), None, "contract not found while IB restarts", Kind.FAILED, TransientError,
                "IB's servers restart from about 23:45 to 00:45 New York, and do not know valid contracts then. Try later.",
                f"{_FACTS}; ib_insync thread 330")  # fmt: skip
_FARM_OUT = Code((162, 200), None, "answered during an outage", Kind.FAILED, TransientError, _WAIT,
                 "docs/design.md, 6: an answer of a broken farm is no evidence; ib_insync thread 330")  # fmt: skip


def classify(
    code: int, text: str, *, now: datetime, during_history: bool = True, outages: Collection[Outage] = frozenset()
) -> Outcome:
    """The meaning of message ``code`` with ``text``.

    ``now`` is aware; it decides whether a 200 falls into the nightly reset. ``during_history``: the message answers a request
    for **bars**; only then does "no data" mean an empty window (the same text for a head timestamp is a permanent failure).
    ``outages``: what is out; then neither "no data" nor "no such contract" is believed. A code without a row is a failure
    that may be tried again; only in 2100 to 2199, the gateway's range of warnings, it is a notice, because such a message leaves
    the request running, and its bars would be lost.

    Raises:
        ValueError: ``now`` has no zone.
    """
    require_utc(now, "now")
    for row in CODES:
        if row.matches(code, text):
            return Outcome(code, text, _adjust(row, now, during_history, outages))
    return Outcome(code, text, _UNKNOWN_NOTICE if 2100 <= code <= 2199 else _UNKNOWN_FAILURE, is_known=False)


def _adjust(row: Code, now: datetime, during_history: bool, outages: Collection[Outage]) -> Code:
    if row.kind is Kind.EMPTY:
        if Outage.HISTORY in outages or Outage.LINK in outages:
            return _FARM_OUT
        return row if during_history else _EMPTY_OUTSIDE_BARS
    if row.codes == (200,) and row.pattern is None:
        if Outage.DEFINITIONS in outages or Outage.LINK in outages:
            return _FARM_OUT
        if in_nightly_reset(now):
            return _NOT_NOW
    return row
