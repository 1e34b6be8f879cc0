"""The series that a symbol means, and the start of its history: both are needed before a load.

The series comes from the universe, else from the cache or from IB, and is then added to the universe. Among several contracts
the user chooses, never this module. The start of history comes from the sidecar where it is known, else from IB's head
timestamp, which is a hint only: it is checked with one long daily request, the window begins earlier by a margin, and a load
takes a start for certain only when the bars themselves show it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from ktrdr_pipelines.calendars import calendar_of
from ktrdr_pipelines.domain.instruments import Instrument, Series, file_symbol
from ktrdr_pipelines.domain.load_request import NO_CHOICE, Choice
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits, Timeframe
from ktrdr_pipelines.errors import BugError, GatewayUnreachable, InputError, KtrdrError, PermanentError, StoreError
from ktrdr_pipelines.ib.contracts import (
    ContractInfo,
    EmptyContractAnswer,
    choose_contract,
    complete_instrument,
    list_candidates,
)
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.ib.symbol_cache import KnownSymbols
from ktrdr_pipelines.planning.open_ended import reach_from_now
from ktrdr_pipelines.planning.requests import Request
from ktrdr_pipelines.universe.file import Universe

log = logging.getLogger(__name__)


def describe_retention(series: Series, start: datetime) -> str:
    """A sentence: bars before ``start`` are beyond IB's retention."""
    return (
        f"{series.timeframe} bars before {start:%Y-%m-%d} are beyond IB's retention (six months) and were not asked for"
    )


@dataclass(frozen=True, slots=True)
class Discovered:
    """The one contract of a symbol: ``instrument`` as it goes into the universe, pinned, and IB's details of it."""

    instrument: Instrument
    contract: ContractInfo


def symbols_file(history: IBHistory) -> KnownSymbols:
    """The cache of this gateway's address, beside the pacing ledger, for listing. For one account: `known_to_account`."""
    key = "".join(c if c.isalnum() else "_" for c in history.address.login)
    return KnownSymbols(history.address.state_dir / "ib" / f"symbols_{key}.json", history.now)


def known_to_account(history: IBHistory) -> KnownSymbols:
    """The cache as valid for the account behind this gateway."""
    return replace(symbols_file(history), account=history.account)


def discover(
    symbol: str, *, history: IBHistory, choice: Choice = NO_CHOICE, known: KnownSymbols | None = None
) -> Discovered:
    """The contract of ``symbol`` at IB: tried as CASH, STK and FUT in that order, or as ``choice`` has it.

    Raises:
        AmbiguousSymbol: several contracts fit; all are in it, the user has to choose.
        PermanentError: IB has none; the message offers similar symbols.
        InputError: not a symbol, or its conId is another instrument's. KtrdrError: IB could not be asked.
    """
    candidates = list_candidates(symbol, choice)
    known = known or known_to_account(history)
    key = " ".join((candidates[0].symbol if candidates else symbol, choice.sec_type, choice.exchange, choice.currency,
                    str(choice.con_id or "")))  # fmt: skip
    before = known.find(key)
    if before is not None and before.instrument is not None and before.contract is not None:
        return Discovered(before.instrument, before.contract)
    if before is not None:
        raise unknown_symbol(symbol, candidates, before.similar, f"asked {format_instant(before.asked_at)}, asked again after "
                       f"{format_instant(before.until)}")  # fmt: skip
    doubts: list[KtrdrError] = []
    for candidate in candidates:
        try:
            found = _try_candidate(symbol, candidate, history)
        except (EmptyContractAnswer, BugError) as error:
            # A request that is malformed for one type (321) may be valid for the next; but then "none" is not certain.
            doubts.append(error)
            continue
        if found is not None:
            known.remember(key, found.instrument, found.contract)
            return found
    if doubts:
        raise doubts[-1]
    similar = find_similar(symbol, history)
    known.remember(key, None, None, similar)
    raise unknown_symbol(symbol, candidates, similar)


def find_similar(symbol: str, history: IBHistory) -> tuple[str, ...]:
    """Symbols of IB that are similar to ``symbol``, which may be misspelt."""
    return tuple(each.describe() for each in history.find_matching(symbol.strip())[:8])


def _try_candidate(symbol: str, candidate: Instrument, history: IBHistory) -> Discovered | None:
    """The contract of ``candidate``; None when IB has none."""
    doing = f"looking up {symbol} as {candidate.sec_type}"
    details = history.describe(candidate, doing)
    if not details:
        return None
    try:
        contract = choose_contract(candidate, details)
    except PermanentError:
        return None
    except KtrdrError as error:
        raise error.while_doing(doing) from None
    return Discovered(_settle_calendar(complete_instrument(candidate, contract)), contract)


def _settle_calendar(instrument: Instrument) -> Instrument:
    """``instrument`` with its primary exchange only where its calendar does not follow from exchange and currency."""

    def calendar(of: Instrument) -> str:
        try:
            return calendar_of(of)
        except InputError:
            return ""

    plain = replace(instrument, primary_exchange="")
    by_home = calendar(instrument)
    return instrument if by_home and by_home != calendar(plain) else plain


def unknown_symbol(
    symbol: str, candidates: list[Instrument], similar: tuple[str, ...], remembered: str = ""
) -> PermanentError:
    """The error for a symbol that IB does not have."""
    tried = dict.fromkeys(" ".join(filter(None, (c.sec_type, c.ib_symbol, c.currency))) for c in candidates)
    return PermanentError(
        f"IB has no {symbol} (tried as {', '.join(tried) or 'nothing'})"
        + (f" ({remembered})" if remembered else "")
        + (f"; similar: {'; '.join(similar)}" if similar else ""),
        doing="looking up a symbol",
        advice="Check the spelling; indices, crypto and continuous futures need --sec-type (over REST: sec_type), "
        "futures often --exchange.",
        code=200,
    )


def identify_series(
    symbol: str, timeframe: Timeframe, universe: Universe, history: IBHistory, choice: Choice = NO_CHOICE
) -> Series:
    """The series called ``symbol`` at ``timeframe``. An instrument that no universe names is looked up at IB.

    Raises:
        InputError: not a symbol, several contracts fit, or the universe has another one than ``choice``.
        PermanentError: IB has none.
    """
    file_symbol(symbol)
    instrument = universe.find_instrument(symbol)
    if instrument is None:
        instrument = discover(symbol, choice=choice, history=history).instrument
        named = universe.find_instrument(instrument.symbol)
        if named is not None:
            instrument = named if named == instrument and named.con_id in (0, instrument.con_id) else instrument
            _refuse_other(named, choice, instrument, history)
    elif choice != NO_CHOICE:
        _refuse_other(instrument, choice, None, history)
    return universe.find(instrument.symbol, timeframe) or Series(instrument, timeframe)


def _refuse_other(named: Instrument, choice: Choice, found: Instrument | None, history: IBHistory) -> None:
    """Check that ``choice`` fits ``named``: a symbol is one instrument, since its files are named after it. IB is asked about
    what the universe leaves open.

    Raises:
        InputError: the universe has another instrument by that symbol.
    """
    is_same = (
        choice.sec_type in ("", named.sec_type)
        and choice.currency in ("", named.currency)
        and (not choice.con_id or choice.con_id == (named.con_id or history.pin(named).con_id))
        and _trades_at(named, choice.exchange, history)
        and (found is None or (found.sec_type, found.currency) == (named.sec_type, named.currency))
    )
    if not is_same:
        raise InputError(
            f"the universe already has another instrument called {named.symbol}: {named.sec_type} on "
            f"{named.primary_exchange or named.exchange} in {named.currency}"
            + (f", conId {named.con_id}" if named.con_id else ""),
            advice="Give the other one a symbol of its own in the universe file (`symbol:` with `ib_symbol:`), or correct the "
            "entry.",
        )


def _trades_at(named: Instrument, exchange: str, history: IBHistory) -> bool:
    if exchange in ("", named.exchange, named.primary_exchange):
        return True
    if named.sec_type != "STK" or named.primary_exchange:
        return False
    try:
        at_home = history.pin(replace(named, primary_exchange=exchange, con_id=0))
    except (PermanentError, InputError):
        return False
    return at_home.con_id == history.pin(named).con_id


# --- where history starts ---------------------------------------------------------------------------------------------


def margin_before_head(timeframe: Timeframe) -> timedelta:
    """How much earlier than the head timestamp a full load begins, because the head can be too late."""
    if timeframe.seconds < 60:
        return timedelta(days=1)
    return timedelta(days=7) if timeframe.is_intraday else timedelta(days=62)


def estimate_history_start(
    series: Series,
    history: IBHistory,
    *,
    earliest: datetime,
    now: datetime,
    limits: HistoryLimits = HistoryLimits.CLASSIC,
) -> datetime:
    """Where a full load begins: the head timestamp less a margin, but not before ``earliest`` (the first partition), and for
    bars of 30 seconds and less not before IB's retention. Asks IB once or twice; without an answer it is ``earliest``.

    A series that IB serves only up to now begins as far back as its longest request reaches.
    """
    earliest = max(earliest, series.timeframe.retained_from(now) or earliest)
    if series.instrument.ends_now:
        return max(earliest, reach_from_now(series, limits, int(now.timestamp())).start)
    pinned = history.pin(series.instrument)
    head = _find_head(pinned, history)
    if head is None:
        return earliest
    if head <= earliest:
        return earliest
    first = _find_older(pinned, head, history)
    return max(earliest, min(head, first or head) - margin_before_head(series.timeframe))


def _find_head(pinned: Instrument, history: IBHistory) -> datetime | None:
    known = known_to_account(history)
    if (before := known.find_head(pinned)) is not None:
        return before.head
    head = history.find_head(pinned)
    if head is not None and head > history.now():
        log.warning("IB's head timestamp of %s lies in the future (%s): ignored", pinned.symbol, head.date())
        return None
    if head is not None:
        known.remember_head(pinned, head)
    return head


def _find_older(pinned: Instrument, head: datetime, history: IBHistory) -> datetime | None:
    """The first daily bar of the year before ``head``, or 1971 when bars fill the whole year: then the head timestamp is far too
    late. None when there is none, or IB does not answer: the check is only a hint too."""
    daily = Series(pinned, TIMEFRAMES["1d"])
    end = head.replace(hour=0, minute=0, second=0, microsecond=0)
    duration = daily.timeframe.longest_request(HistoryLimits.CLASSIC)
    start = end - timedelta(days=365)
    try:
        answer = history.fetch(daily, Request(Window(start, end), end, duration))
    except (GatewayUnreachable, StoreError):
        raise
    except KtrdrError as error:
        log.warning("going on without the check of the start of history of %s: %s", pinned.symbol, error)
        return None
    opens = answer.opens_s[answer.opens_s < end.timestamp()]
    if not len(opens):
        return None
    first = datetime.fromtimestamp(int(opens.min()), end.tzinfo)
    log.warning("%s: IB has bars from %s, before its head timestamp %s", pinned.symbol, first.date(), head.date())
    return (
        datetime(1970, 1, 1, tzinfo=end.tzinfo) + timedelta(days=365) if first - start < timedelta(days=14) else first
    )
