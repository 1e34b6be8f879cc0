"""From the user's instrument to IB's contract: the candidates, the choice among them, what gets pinned.

Pure. Never the first of several: several contracts that fit are an error that lists them all. The specification's order of
discovery (CASH, STK, FUT) is a list of candidates to try.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ktrdr_pipelines.domain.instruments import (
    DEFAULT_EXCHANGES,
    DEFAULT_WHAT_TO_SHOW,
    Hours,
    Instrument,
    file_symbol,
    forex,
    future_product,
    is_future_code,
)
from ktrdr_pipelines.domain.load_request import NO_CHOICE, Choice
from ktrdr_pipelines.errors import InputError, PermanentError, TransientError


class AmbiguousSymbol(InputError):
    """Several contracts fit; ``candidates`` are all of them. The user has to choose."""

    def __init__(self, observed: str, candidates: Sequence[ContractInfo], *, advice: str) -> None:
        super().__init__(observed, advice=advice)
        self.candidates = tuple(candidates)


class EmptyContractAnswer(TransientError):
    """IB's answer had neither a contract nor the error (200) for an unknown one: no evidence. Not tried again at once: what is a
    mishap of one gateway may be the only answer of another."""

    is_transient = False


@dataclass(frozen=True, slots=True)
class ContractInfo:
    """IB's contract details of one contract; strings as IB spells them, empty where it sends none."""

    con_id: int
    symbol: str
    sec_type: str
    exchange: str
    currency: str
    primary_exchange: str = ""
    local_symbol: str = ""
    trading_class: str = ""
    expiry: str = ""
    """Last trade date, ``20241220``."""
    contract_month: str = ""
    """``202412``; energy futures trade last in the month before it."""
    multiplier: str = ""
    long_name: str = ""
    time_zone: str = ""
    valid_exchanges: str = ""
    trading_hours: str = ""
    """The next days' sessions in ``time_zone``: ``20240102:0400-20240102:2000;20240106:CLOSED``."""
    liquid_hours: str = ""
    """The regular ones of them."""

    def describe(self) -> str:
        """One line for a user who has to choose."""
        where = self.primary_exchange or self.exchange
        code = self.local_symbol if self.sec_type == "FUT" else ""
        parts = [code or self.symbol, self.sec_type, where, self.currency, self.expiry, self.long_name]
        if self.sec_type == "FUT":  # products of one name differ in these (silver: SI 5000, SIL 1000)
            parts += [self.trading_class, self.multiplier and f"x {self.multiplier}"]
        parts.append(f"conId {self.con_id}")
        return " ".join(part for part in parts if part)


def list_candidates(symbol: str, choice: Choice = NO_CHOICE) -> list[Instrument]:
    """The candidates for a bare ``symbol``, in the order to ask IB: a currency pair (CASH), a stock (STK), a future (FUT).

    A stock is asked for in US dollars first and then in any currency, a future by its code (``ESZ4``) or by its product. Where
    ``choice`` names a security type, only that one; other types (indices, crypto, continuous futures) have to be named. A conId
    is asked for alone.

    Raises:
        InputError: ``symbol`` is not a symbol, or not a pair of currencies where a pair is wanted.
    """
    wanted = symbol.strip().upper()
    file_symbol(wanted)
    if choice.con_id:
        kinds = [choice.sec_type] if choice.sec_type else ["STK", "CASH", "FUT", "IND", "CRYPTO", "CONTFUT", "CFD"]
        return [Instrument(wanted, kind, choice.exchange, choice.currency, con_id=choice.con_id) for kind in kinds]
    candidates: list[Instrument] = []
    for sec_type in [choice.sec_type] if choice.sec_type else ["CASH", "STK", "FUT"]:
        if sec_type == "CASH":
            if choice.sec_type or re.fullmatch(r"[A-Z]{3}[./]?[A-Z]{3}", wanted):
                pair = forex(wanted)
                if choice.currency in ("", pair.currency):
                    candidates.append(replace(pair, exchange=choice.exchange or pair.exchange))
        elif sec_type == "STK":
            for currency in [choice.currency] if choice.currency else ["USD", ""]:
                candidates += _stocks(wanted, choice.exchange, currency)
        else:
            candidates.append(_other_kind(wanted, sec_type, choice))
    return candidates


def _stocks(symbol: str, exchange: str, currency: str) -> list[Instrument]:
    # An exchange is tried as the primary exchange first, on SMART routing, as `primary_exchange` in the universe file.
    places = [("SMART", exchange), (exchange, "")] if exchange not in ("", "SMART") else [("SMART", "")]
    # IB writes a class of shares behind a space: BRK B.
    names = [symbol, symbol.replace(".", " ")] if re.fullmatch(r"[A-Z]+\.[A-Z]", symbol) else [symbol]
    return [
        Instrument(name, "STK", place, currency, primary_exchange=primary)
        for name in names
        for place, primary in places
    ]


def _other_kind(symbol: str, sec_type: str, choice: Choice) -> Instrument:
    is_code = sec_type == "FUT" and is_future_code(symbol)
    return Instrument(
        symbol,
        sec_type,
        choice.exchange or ("" if sec_type == "FUT" else DEFAULT_EXCHANGES.get(sec_type, "")),
        choice.currency,
        ib_symbol="" if not is_code else future_product(symbol),
        what_to_show=DEFAULT_WHAT_TO_SHOW.get(sec_type, "TRADES"),
        hours=Hours.EXTENDED,
    )


def choose_contract(instrument: Instrument, details: Sequence[ContractInfo]) -> ContractInfo:
    """The one contract among IB's answers that fits ``instrument``.

    Raises:
        PermanentError: none fits.
        InputError: several fit; the message lists each with its conId. Or the conId belongs to another symbol.
    """
    fitting = {d.con_id: d for d in details if _fits(instrument, d)}
    for found in fitting.values():
        if instrument.con_id and not _is_named(instrument, found):
            raise InputError(
                f"conId {found.con_id} is {found.describe()}, not {instrument.ib_symbol}",
                advice="Write the symbol that belongs to the conId, or the conId of the symbol (`ktrdr ib symbols` shows it).",
            )
    if not fitting:
        offered = "; ".join(d.describe() for d in list(details)[:5]) or "nothing"
        raise PermanentError(
            f"IB has no {_describe(instrument)} (it offered: {offered})",
            advice="Check symbol, security type, exchange and currency.",
        )
    if len(fitting) > 1:
        candidates = sorted(fitting.values(), key=lambda d: (d.expiry, d.con_id))
        raise AmbiguousSymbol(
            f"{instrument.symbol} is ambiguous: {'; '.join(d.describe() for d in candidates)}",
            candidates,
            advice="Choose one by --con-id (or --sec-type, --exchange, --currency; in the REST API con_id and so on), or put "
            f"its con_id (or {'expiry' if instrument.sec_type == 'FUT' else 'primary_exchange'}) in the universe file."
            + (" --sec-type CONTFUT is the continuous future." if instrument.sec_type == "FUT" else ""),
        )
    return next(iter(fitting.values()))


_KINDS = {"CONTFUT": ("CONTFUT", "FUT")}
"""IB may describe a continuous future as its front contract."""


def _fits(instrument: Instrument, info: ContractInfo) -> bool:
    if instrument.con_id and info.con_id != instrument.con_id:
        return False
    fits = (not info.sec_type or info.sec_type in _KINDS.get(instrument.sec_type, (instrument.sec_type,))) and (
        not info.currency or not instrument.currency or info.currency == instrument.currency
    )
    # A conId fixes exchange and expiry; but bars of another type, or in another currency, must never get into the file.
    return fits and (bool(instrument.con_id) or _fits_unpinned(instrument, info))


def _fits_unpinned(instrument: Instrument, info: ContractInfo) -> bool:
    return (
        (not instrument.primary_exchange or instrument.primary_exchange in _homes(info))
        and (not instrument.expiry or _expires(info, instrument.expiry))
        and (not _is_named_by_code(instrument) or info.local_symbol in ("", instrument.symbol))
    )


def _is_named(instrument: Instrument, info: ContractInfo) -> bool:
    """True if ``instrument`` names ``info``: by its symbol, its local symbol or as a pair; punctuation does not matter."""
    names = {info.symbol, info.local_symbol, info.symbol + info.currency}
    if not (info.symbol or info.local_symbol):
        return True  # this gateway sends no symbols
    plain = {"".join(c for c in name.upper() if c.isalnum()) for name in names}
    return "".join(c for c in instrument.ib_symbol.upper() if c.isalnum()) in plain


def _is_named_by_code(instrument: Instrument) -> bool:
    return instrument.sec_type == "FUT" and not instrument.expiry and is_future_code(instrument.symbol)


def _expires(info: ContractInfo, expiry: str) -> bool:
    # A month means the contract month, which may lie after the last trade date; only where IB does not send it, that date's.
    if len(expiry) == len("202412") and info.contract_month:
        return info.contract_month == expiry
    return info.expiry.startswith(expiry)


def _homes(info: ContractInfo) -> Sequence[str]:
    """Possible primary exchanges of the contract: the one IB sends, or, where it sends none, every exchange that it trades at."""
    if info.primary_exchange:
        return (info.primary_exchange, info.exchange)
    return (info.exchange, *info.valid_exchanges.split(","))


def _describe(instrument: Instrument) -> str:
    if instrument.con_id:
        return f"{instrument.sec_type} with conId {instrument.con_id}" + (
            f" in {instrument.currency}" if instrument.currency else ""
        )
    return f"{instrument.sec_type} {instrument.ib_symbol}" + (
        f" in {instrument.currency}" if instrument.currency else ""
    )


def pin_contract(instrument: Instrument, info: ContractInfo) -> Instrument:
    """``instrument`` with IB's conId, zone and last trade date, which are not part of its identity. A continuous future gets no
    conId: IB's may be that of the front contract, which changes with each roll."""
    return replace(
        instrument,
        con_id=0 if instrument.sec_type == "CONTFUT" else info.con_id,
        time_zone=info.time_zone,
        last_trade_date=info.expiry[:8] if instrument.sec_type == "FUT" else "",
    )


def complete_instrument(candidate: Instrument, info: ContractInfo) -> Instrument:
    """``candidate`` completed by IB's description: type, exchange, currency, expiry, conId. A future that was asked for by its
    product gets its code as symbol (``ES`` -> ``ESZ4``), a pair that was asked for by its conId the pair's symbol."""
    symbol, sec_type = candidate.symbol, info.sec_type or candidate.sec_type
    if candidate.sec_type == "CONTFUT":
        sec_type = "CONTFUT"
    if sec_type == "CASH":
        pair = forex(f"{info.symbol}{info.currency}")
        return replace(pair, exchange=info.exchange or pair.exchange, con_id=info.con_id, time_zone=info.time_zone)
    if sec_type == "FUT" and info.local_symbol and not is_future_code(symbol):
        symbol = " ".join(info.local_symbol.split())
    exchange = candidate.exchange or info.exchange
    if sec_type == "STK" and "SMART" in info.valid_exchanges.split(",") and not candidate.exchange:
        exchange = "SMART"
    return Instrument(
        symbol,
        sec_type,
        exchange,
        info.currency or candidate.currency,
        ib_symbol=info.symbol or candidate.ib_symbol,
        primary_exchange=info.primary_exchange if sec_type == "STK" else "",
        expiry=(info.contract_month or info.expiry) if sec_type == "FUT" else "",
        what_to_show=DEFAULT_WHAT_TO_SHOW.get(sec_type, "TRADES"),
        hours=Hours.REGULAR if sec_type == "STK" else Hours.EXTENDED,
        con_id=0 if sec_type == "CONTFUT" else info.con_id,
        time_zone=info.time_zone,
    )
