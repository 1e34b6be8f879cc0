"""Which series a person means, and where its history starts: questions that come before a load.

The universe answers the first where it can; otherwise IB is asked (or what it said a while ago is remembered), and the
result is added to the universe. Several contracts are never decided here: a person chooses. The start of history comes from the
sidecar where it is known, else from IB's head timestamp, which is a hint only: it is checked against one long daily request,
the window begins earlier by a margin, and a load believes in a start only when the bars themselves show it.
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
    NoContractTold,
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

SHORT_BAR_HISTORY = timedelta(days=183)
"""IB keeps bars of 30 seconds and less for six months (ib_facts.md, 5)."""


def kept_from(timeframe: Timeframe, now: datetime) -> datetime | None:
    """Where what IB keeps of ``timeframe`` begins, at a midnight UTC; None where it keeps everything. An empty answer about older
    bars proves nothing, so they are never asked for."""
    if timeframe.seconds > 30:
        return None
    oldest = now - SHORT_BAR_HISTORY
    return oldest.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)


def say_kept(series: Series, kept: datetime) -> str:
    """That nothing older than ``kept`` can be had, as a sentence."""
    return f"IB keeps {series.timeframe} bars for six months: nothing before {kept:%Y-%m-%d} can be had, nor was asked"


@dataclass(frozen=True, slots=True)
class Discovered:
    """The one contract that a symbol means: ``instrument`` as it goes into the universe, pinned, and IB's details of it."""

    instrument: Instrument
    contract: ContractInfo


def symbols_file(history: IBHistory) -> KnownSymbols:
    """What was told of symbols at this gateway's address: one file for each, beside the pacing ledger. For listing; what counts
    for an account, `known_to_account` tells."""
    key = "".join(c if c.isalnum() else "_" for c in history.address.login)
    return KnownSymbols(history.address.state_dir / "ib" / f"symbols_{key}.json", history.now)


def known_to_account(history: IBHistory) -> KnownSymbols:
    """What the account behind this gateway was told."""
    return replace(symbols_file(history), account=history.account)


def discover(
    symbol: str, *, history: IBHistory, choice: Choice = NO_CHOICE, known: KnownSymbols | None = None
) -> Discovered:
    """What ``symbol`` means to IB: tried as CASH, STK and FUT in that order, or as ``choice`` says.

    Raises:
        AmbiguousSymbol: several contracts fit; all are in it, a person has to choose.
        PermanentError: IB knows none; the message offers symbols that are like it.
        InputError: no symbol at all, or its conId is another instrument's. KtrdrError: IB could not be asked.
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
        except (NoContractTold, BugError) as error:
            # What is no proper question for one kind (321) may be one for the next; but then nobody said that there is none.
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
    """What IB has that is like ``symbol``, for people who may have misspelt it."""
    return tuple(each.describe() for each in history.find_matching(symbol.strip())[:8])


def _try_candidate(symbol: str, candidate: Instrument, history: IBHistory) -> Discovered | None:
    """The contract of ``candidate``; None when IB knows none."""
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
    """``instrument`` with its primary exchange only where that says more about its calendar than exchange and currency do."""

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
    """What a person is told of a symbol that IB does not know."""
    tried = dict.fromkeys(" ".join(filter(None, (c.sec_type, c.ib_symbol, c.currency))) for c in candidates)
    return PermanentError(
        f"IB knows no {symbol} (tried as {', '.join(tried) or 'nothing'})"
        + (f" ({remembered})" if remembered else "")
        + (f"; similar: {'; '.join(similar)}" if similar else ""),
        doing="looking up a symbol",
        advice="Check the spelling; indices, crypto and continuous futures need --sec-type, futures often --exchange.",
        code=200,
    )


def identify_series(
    symbol: str, timeframe: Timeframe, universe: Universe, history: IBHistory, choice: Choice = NO_CHOICE
) -> Series:
    """The series called ``symbol`` at ``timeframe``. An instrument that no universe names is looked up at IB.

    Raises:
        InputError: not a symbol, several contracts fit, or the universe means another one than ``choice``.
        PermanentError: IB knows none.
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
    """A symbol is one instrument, for its files carry its name. What the universe leaves open is asked of IB.

    Raises:
        InputError: the universe means another instrument by that symbol.
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
            f"the universe already means another instrument by {named.symbol}: {named.sec_type} on "
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
    bars of 30 seconds and less not before what IB keeps. Asks IB once or twice; without an answer it is ``earliest``.

    A series that IB tells only up to now begins as far back as its longest request reaches.
    """
    if series.timeframe.seconds <= 30:
        earliest = max(earliest, now - SHORT_BAR_HISTORY)
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
        log.warning("IB says that %s begins in the future (%s): not believed", pinned.symbol, head.date())
        return None
    if head is not None:
        known.remember_head(pinned, head)
    return head


def _find_older(pinned: Instrument, head: datetime, history: IBHistory) -> datetime | None:
    """The first daily bar of the year before ``head``, or of all time when the whole year is full of them: then the head
    timestamp is far too late. None when there is none, or IB does not answer: the check is only a hint too."""
    daily = Series(pinned, TIMEFRAMES["1d"])
    end = head.replace(hour=0, minute=0, second=0, microsecond=0)
    duration = daily.timeframe.longest_request(HistoryLimits.CLASSIC)
    start = end - timedelta(days=365)
    try:
        answer = history.fetch(daily, Request(Window(start, end), end, duration))
    except (GatewayUnreachable, StoreError):
        raise
    except KtrdrError as error:
        log.warning("going on without a check of the start of history of %s: %s", pinned.symbol, error)
        return None
    opens = answer.opens_s[answer.opens_s < end.timestamp()]
    if not len(opens):
        return None
    first = datetime.fromtimestamp(int(opens.min()), end.tzinfo)
    log.warning("%s: IB has bars from %s, before its head timestamp %s", pinned.symbol, first.date(), head.date())
    return (
        datetime(1970, 1, 1, tzinfo=end.tzinfo) + timedelta(days=365) if first - start < timedelta(days=14) else first
    )
